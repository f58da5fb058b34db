"""`dart-eval compare`: is the difference between two sets of results more than noise?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import FORMATS, one_of, own
from dart_eval.cli.view import output, put
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, format_of
from dart_eval.util.text import items_of

OUT = Path("out")
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
ROWS_HELP = (
    "Compare row A of the board with row B. Name rows as the board does; the sparsity only where it has several."
)
METRIC_HELP = (
    "Compare these metrics, comma-separated, or all.  "
    r"\[default: the main metric of each task, and the log-likelihood of right answers]"
)
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
    traits = {"method": method, "sparsity": sparsity, "model": model, "row": row}
    given = {name: items_of(text) for name, text in traits.items() if text is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in given)} do not go together", "leave one of them out")
    for name, sides in given.items():
        if len(sides) != 2:
            raise UserError(
                f"--{name} {','.join(sides)!r} must name two, A,B", f"see dart-eval compare --help for --{name}"
            )
    if not given and len(folders or []) != 2:
        count = f"{len(folders or [])} folders are given, and no option says what to compare"
        raise UserError(count, "give two folders, or for example --method dart,griffin")
    if save is not None:
        check_target(save)
        format = format_of(save, format, FORMATS[1:])
    from dart_eval.results import compare as comparing  # slow to import: options are refused first

    places, metrics = [Path(folder) for folder in folders or [OUT]], items_of(metric or [])
    if given:
        ((name, (a, b)),) = given.items()
        comparison = comparing.compare_within(name, a, b, places, metrics)
    else:
        comparison = comparing.compare_folders(places[0], places[1], metrics)
    if format == "json":
        put(comparison.to_json(), save)
    else:
        output([comparing.table(comparison)], format, save)
