"""`dart-eval compare`: is the difference between two sets of results more than noise?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import FORMATS, Force, one_of, own
from dart_eval.cli.view import output, put
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, format_of
from dart_eval.util.text import items_of

FOLDERS_HELP = r"Two folders of results. With --row one folder, or several that count as one.  \[default: out]"
ROW_HELP = "Compare two rows of the board. A name without its read stands for all its reads."
METRIC_HELP = (
    "Compare these metrics, comma-separated, or all.  "
    r"\[default: the main metric of each task, and the log-likelihood of right answers]"
)
FORMAT_HELP = r"Output format.  \[default: the ending of --save, else a table, or md in a pipe]"


def compare(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER", help=FOLDERS_HELP)] = None,
    row: Annotated[list[str] | None, own(ROW_HELP, None, "A,B")] = None,
    metric: Annotated[list[str] | None, own(METRIC_HELP, None, "NAMES")] = None,
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP)] = None,
    save: Annotated[Path | None, own("Write to this file instead of the terminal.", None, "FILE")] = None,
    force: Force = False,
) -> None:
    """Compare two sets of cells, paired document by document, with tests and intervals.

    Two folders: cells match if they answer the same request; other differences (code, versions, weights) are listed.
    Two rows: cells match at equal reads, unless both names say theirs. Dense goes with every read.

    \b
    [bold]Examples[/bold]
    dart-eval compare out-old out-new
    dart-eval compare out --row dart,griffin
    dart-eval compare out --row 'dart at 50 %,dart at 30 %' --metric acc
    dart-eval compare out --row 'grinqh at 30 %,dense on 4 bits' --format json
    """
    places, rows, metrics = folders or [Path("out")], items_of(row or []), items_of(metric or [])
    if len(places if row is None else rows) != 2:
        what = "two folders to compare" if row is None else f"two rows in --row {','.join(rows)!r}"
        raise UserError(f"there are not {what}", "give two, for example dart-eval compare out --row dart,griffin")
    if save is not None:
        check_target(save)
        format = format_of(save, format, FORMATS[1:])
    from dart_eval.results.compare import compare_folders, compare_rows, table  # slow: options are refused first

    if row is None:
        comparison = compare_folders(places[0], places[1], metrics)
    else:
        comparison = compare_rows(rows[0], rows[1], places, metrics)
    if format == "json":
        put(comparison.to_json(), save, force)
    else:
        output([table(comparison)], format, save, force)
