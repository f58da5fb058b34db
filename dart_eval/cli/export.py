"""`dart-eval export`: results as files of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli import complete
from dart_eval.cli.view import say
from dart_eval.errors import UserError, nearest
from dart_eval.export import FORMATS, RELATIONSHIPS, Teller
from dart_eval.export import export as write_all

Folder = Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")]
To = Annotated[
    str,
    typer.Option(
        metavar="FORMAT", help="every-eval-ever, eval-results or lm-eval.", autocompletion=complete.words(FORMATS)
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help=r"Write into this folder.  \[default: export/FORMAT in the results' folder]"),
]
ModelId = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="The model's name on the hub, where results have a folder's name."),
]
DatasetOf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=OWNER/NAME",
        help="Data set of a task on the hub, where its YAML names none or another; TASK=OWNER/NAME:ID also names the "
        "task within a benchmark. May be given again.",
    ),
]
Organisation = Annotated[str | None, typer.Option(metavar="NAME", help="Who publishes the results (every-eval-ever).")]
Relationship = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="What you are to the model's developer: first_party, third_party, collaborative or other "
        r"(every-eval-ever).  \[default: other]",
        autocompletion=complete.words(RELATIONSHIPS),
    ),
]
Page = Annotated[
    str | None, typer.Option(metavar="URL", help="A page about the results (every-eval-ever, eval-results).")
]
Force = Annotated[bool, typer.Option("--force", metavar="", help="Replace files of an earlier export.")]


def export(
    folder: Folder = Path("out"),
    to: To = "",
    output: Output = None,
    model_id: ModelId = None,
    dataset: DatasetOf = None,
    organisation: Organisation = None,
    relationship: Relationship = None,
    page: Page = None,
    force: Force = False,
) -> None:
    """Write results as other projects read them. The results themselves stay as they are.

    The pruner, its parameters, sparsity, scope and seed stand in each format:

    \b
    every-eval-ever  JSON and JSONL for the Every Eval Ever datastore
    eval-results     YAML for a model's repository on the Hugging Face hub
    lm-eval          results_*.json and samples_*.jsonl, as lm-eval writes them

    [bold]Examples[/bold]

    \b
    dart-eval export out --to lm-eval
    dart-eval export out --to every-eval-ever --organisation "My Lab" --output eee
    dart-eval export out --to eval-results --model-id google/gemma-3-270m
    """
    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}" if to else "--to is missing", nearest(to, FORMATS))
    for name, value in (("organisation", organisation), ("relationship", relationship), ("page", page)):
        if value is not None and name not in FORMATS[to]:
            takes = " or ".join(f for f, options in FORMATS.items() if name in options)
            raise UserError(f"--{name} goes with --to {takes}", f"leave it out: {to} has no place for it")
    if relationship is not None and relationship not in RELATIONSHIPS:
        raise UserError(f"unknown relationship {relationship!r}", nearest(relationship, RELATIONSHIPS))
    from dart_eval.results.store import Store

    given = {"organisation": organisation, "relationship": relationship, "page": page}
    teller = Teller(**{name: value for name, value in given.items() if value})
    target = output or folder / "export" / to
    written = write_all(Store(folder), to, target, teller, model_id, dataset or (), force)
    say(f"wrote {len(written)} file{'s' if len(written) > 1 else ''} to {target}")
