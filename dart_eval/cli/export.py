"""`dart-eval export`: results as files of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import one_of, own
from dart_eval.cli.view import say
from dart_eval.export import FORMATS
from dart_eval.export import export as write_all
from dart_eval.export.teller import RELATIONSHIPS, Teller
from dart_eval.util.errors import UserError, nearest

Folder = Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")]
To = Annotated[str, own("Format: every-eval-ever, eval-results or lm-eval.", None, "FORMAT", offers=FORMATS)]
Output = Annotated[
    Path | None, own(r"Write to this folder.  \[default: export/FORMAT in the results folder]", None, "DIR")
]
ModelId = Annotated[
    str | None, own("Name of the model on the hub, if the results name a local folder.", None, "OWNER/NAME")
]
DATASET = (
    "Hub data set of a task, if its YAML names none or another one. TASK=OWNER/NAME:ID also names the task within a "
    "benchmark. Repeat the option for more tasks."
)
DatasetOf = Annotated[list[str] | None, own(DATASET, None, "TASK=OWNER/NAME")]
Organisation = Annotated[str | None, own("Publisher of the results (every-eval-ever).", None, "NAME")]
RELATION = (
    "Relationship to the model's developer: first_party, third_party, collaborative or other (every-eval-ever).  "
    r"\[default: other]"
)
Relationship = Annotated[str | None, one_of(RELATIONSHIPS, "relationship", RELATION, metavar="WORD")]
Page = Annotated[str | None, own("Web page about the results (every-eval-ever, eval-results).", None, "URL")]
Force = Annotated[bool, own("Replace files of an earlier export.", None, "", "--force")]


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
    """Write results in the formats of other projects. The results themselves do not change.

    Each format records the pruner, its parameters, sparsity, scope and seed:

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
    given = {"organisation": organisation, "relationship": relationship, "page": page}
    told = {name: value for name, value in given.items() if value}
    for name in told:
        if name not in FORMATS[to]:
            takes = " or ".join(f for f, options in FORMATS.items() if name in options)
            raise UserError(f"--{name} needs --to {takes}", f"leave it out: {to} has no field for it")
    from dart_eval.results.store import Store

    target = output or folder / "export" / to
    written = write_all(Store(folder), to, target, Teller(**told), model_id, dataset or (), force)
    say(f"wrote {len(written)} file{'s' if len(written) > 1 else ''} to {target}")
