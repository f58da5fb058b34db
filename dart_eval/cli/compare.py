"""`dart-eval compare`: is the difference between two sets of results more than noise?"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import FORMATS, one_of, own
from dart_eval.cli.view import put, show
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, format_of
from dart_eval.util.text import items_of

OUT = Path("out")
EXAMPLES = {
    "method": "dart,griffin", "sparsity": "0.5,0.7", "model": "model@1a2b3c4d,model@5e6f7a8b",
    "row": "'grinqh 70 %,dense on 4 bits'",
}  # fmt: skip
FOLDERS_HELP = (
    "Two folders of results. With --method, --sparsity, --model or --row: one folder, or several that "
    r"count as one.  \[default: out]"
)
METHODS_HELP = "Compare the cells of method A with the cells of method B."
SPARSITIES_HELP = "Compare the cells at sparsity A with the cells at sparsity B; 0 is dense."
MODELS_HELP = (
    "Compare the cells of model A with the cells of model B. If several models share a name, give NAME@ and "
    "the first digits of the weights' hash or of the commit."
)
ROWS_HELP = "Compare row A of the board with row B. Name rows as the board does, with their sparsity."
METRIC_HELP = r"Compare these metrics, comma-separated, or all.  \[default: the main metric of each task]"
FORMAT_HELP = r"Output format.  \[default: the ending of --save, else a table, or md in a pipe]"


def compare(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER", help=FOLDERS_HELP)] = None,
    method: Annotated[list[str] | None, own(METHODS_HELP, None, "A,B")] = None,
    sparsity: Annotated[list[str] | None, own(SPARSITIES_HELP, None, "A,B")] = None,
    model: Annotated[list[str] | None, own(MODELS_HELP, None, "A,B")] = None,
    row: Annotated[list[str] | None, own(ROWS_HELP, None, "A,B")] = None,
    metric: Annotated[list[str] | None, own(METRIC_HELP, None, "NAMES")] = None,
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP)] = None,
    save: Annotated[Path | None, own("Write to this file instead of the terminal.", None, "FILE")] = None,
) -> None:
    """Compare two sets of cells, paired document by document, with tests and intervals.

    Two folders: cells match if they answer the same request; other
    differences (code, versions, weights) are listed. One folder: cells match
    if they differ only in method, sparsity or model, or in the two board rows.

    \b
    [bold]Examples[/bold]
    dart-eval compare out-old out-new
    dart-eval compare out --method dart,griffin
    dart-eval compare out --method dart,dart:allocation=uniform --metric acc
    dart-eval compare out --sparsity 0,0.5 --format json
    dart-eval compare out --model model@1a2b3c4d,model@5e6f7a8b
    dart-eval compare out --row 'grinqh 70 %,dense on 4 bits'
    """
    given = [Path(folder) for folder in folders or []]
    if save is not None:
        check_target(save)
        format = format_of(save, format, FORMATS[1:])
    trait = _trait({"method": method, "sparsity": sparsity, "model": model, "row": row}, given)
    from dart_eval.results import compare as comparing  # slow to import: options are refused first

    metrics = items_of(metric or [])
    if trait is None:
        comparison = comparing.compare_folders(given[0], given[1], metrics)
    else:
        comparison = comparing.compare_within(*trait, given or [OUT], metrics)
    if save is None and (format == "table" or (format is None and sys.stdout.isatty())):
        show(comparing.table(comparison))
        return
    put(comparing.render(comparison, format or "md"), save)


def _trait(options: dict[str, list[str] | None], folders: Sequence[Path]) -> tuple[str, str, str] | None:
    """Return what cells of one folder differ in, with A and B; None to compare two folders.

    Args:
        options: name -> value of the options for one folder.
        folders: as given.

    Raises:
        UserError: not two things are named.
    """
    said = {name: text for name, text in options.items() if text is not None}
    if len(said) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in said)} do not go together", "leave one of them out")
    for name, text in said.items():
        named = items_of(text)
        if len(named) != 2:
            raise UserError(f"--{name} {','.join(text)!r} must name two, A,B", f"for example --{name} {EXAMPLES[name]}")
        return name, named[0], named[1]
    if len(folders) != 2:
        count = ("no folder is", "one folder is")[len(folders)] if len(folders) < 2 else f"{len(folders)} folders are"
        raise UserError(
            f"{count} given, and no option says what to compare",
            f"give two folders, or for example --method {EXAMPLES['method']}",
        )
    if not any(os.path.exists(folder) for folder in folders):
        _refuse_methods([str(folder) for folder in folders])
    return None


def _refuse_methods(names: Sequence[str]) -> None:
    """Refuse names of methods in place of folders."""
    from dart_eval.pruning.registry import names as known

    if all(name.partition(":")[0] in known() for name in names):
        line = shlex.join(["dart-eval", "compare", str(OUT), "--method", ",".join(names)])
        raise UserError(f"{' and '.join(names)} are methods, not folders", f"write: {line}")
