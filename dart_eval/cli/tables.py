"""`dart-eval tables`: the tables of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import BOARD, COSTS, FORMATS, Force, one_of, own
from dart_eval.cli.view import output, put
from dart_eval.evaluation.task_names import ALIASES
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, format_of

VIEWS = (BOARD, "long", COSTS)
PICTURES = (".png", ".svg", ".pdf")
FORMAT_HELP = (
    "Output format. The default is the ending of --save. Without --save a terminal gets tables; a pipe gets the board "
    "100 columns wide, and other views as md."
)
VIEW_HELP = (
    "View to show. board: docs/concepts.md explains its columns; long: every metric with n; costs: FLOPs, bytes read, "
    "memory and time of every cell. json and csv always have every number, each with dense's on the same documents."
)
SAVE_HELP = (
    "Write to this file instead of the terminal. FILE.svg, .png or .pdf draws quality against bytes read, as the board "
    "has it."
)
METRIC_HELP = "Show this metric for the tasks that have it, such as acc_norm."
LEVEL_HELP = "Show dense and the levels that read about this share of the FFN bytes, such as 0.3."
SUBTASKS_HELP = "Also show the members of groups, such as mmlu's subjects."
TASKS_HELP = "Show only these tasks, comma-separated. Methods that also ran on different tasks then share one board."


def tables(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP, metavar="FORMAT")] = None,
    view: Annotated[str, one_of(VIEWS, "view", VIEW_HELP, metavar="NAME")] = BOARD,
    subtasks: Annotated[bool, own(SUBTASKS_HELP, None, "", "--subtasks")] = False,
    tasks: Annotated[list[str] | None, own(TASKS_HELP, None, "NAMES")] = None,
    metric: Annotated[str | None, own(METRIC_HELP, None, "NAME")] = None,
    level: Annotated[float | None, own(LEVEL_HELP, None, "READ")] = None,
    save: Annotated[Path | None, own(SAVE_HELP, None, "FILE")] = None,
    force: Force = False,
) -> None:
    """Print the board of a results folder (one row per method and sparsity, best first), or its long tables.

    \b
    [bold]Examples[/bold]
    dart-eval tables out
    dart-eval tables out --metric acc_norm --level 0.3
    dart-eval tables out --save board.svg
    dart-eval tables out --tasks arc,hellaswag
    dart-eval tables out --format json
    dart-eval tables out --format tex --save tables.tex
    """
    from dart_eval.results import tables as made  # statistics: not for `--help`
    from dart_eval.results.board import boards
    from dart_eval.results.frame import lines, of_tasks
    from dart_eval.results.show import data_text
    from dart_eval.results.store import Store

    if view != BOARD and (metric is not None or level is not None):
        raise UserError(f"--view {view} has no --metric and no --level", "leave them out, or --view")
    store, picture = Store(folder), view == BOARD and save is not None and save.suffix in PICTURES
    if save is not None:
        check_target(save)
        format = None if picture else format_of(save, format, FORMATS[1:])
    records = of_tasks(store.load(), tasks, ALIASES)
    if picture and save is not None:
        from dart_eval.results.report.charts import draw  # matplotlib

        put(draw(boards(store, records, metric), save.suffix[1:]), save, force)
    elif format in ("csv", "json"):
        put(data_text(lines(store, records, subtasks), format), save, force)
    elif view == BOARD:
        output(made.board_tables(boards(store, records, metric), level), format or "table", save, force)
    else:
        shown = [made.costs(records)] if view == COSTS else made.quality(lines(store, records, subtasks), records)
        output(shown, format, save, force)
