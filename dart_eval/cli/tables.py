"""`dart-eval tables`: the tables of a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import one_of
from dart_eval.cli.view import put, save_text
from dart_eval.files import check_target, format_of
from dart_eval.results.rows import of_tasks
from dart_eval.results.store import Store
from dart_eval.results.tables import FORMATS
from dart_eval.results.tables import render as as_data

BOARD, FRONTIER, ALL = "board", "frontier", "all"
VIEWS = (BOARD, "long", "flops", "memory", "detector", FRONTIER, ALL)
PICTURES = (".png", ".svg", ".pdf")
FORMAT_HELP = (
    "Print md, csv, tex or json. Without it the ending of --save says which. The board is always drawn, 100 columns "
    "wide in a pipe; other tables are drawn on a terminal, and a pipe gets md."
)
VIEW_HELP = (
    "Show this view. board; long: every metric with n; flops; memory; detector: alarms and re-masks over generated "
    "texts, and drift tasks; frontier: how far a method can go (--save FILE.svg draws it); all. json and csv hold "
    "every number, whatever the view."
)
Subtasks = Annotated[
    bool, typer.Option("--subtasks", metavar="", help="Show also the members of groups, such as mmlu's subjects.")
]


Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="NAMES",
        help="Show the cells of these tasks alone, with commas between them: methods that ran on other tasks stand on "
        "one board.",
    ),
]  # fmt: skip


def tables(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    format: Annotated[str | None, one_of(FORMATS, "format", FORMAT_HELP, metavar="FORMAT")] = None,
    view: Annotated[str, one_of(VIEWS, "view", VIEW_HELP, metavar="NAME")] = BOARD,
    subtasks: Subtasks = False,
    tasks: Tasks = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to this file instead of the terminal.")
    ] = None,
) -> None:
    """Print the board of a folder of results: one row a method and sparsity, best first, or the long tables behind it.

    [bold]Examples[/bold]

      dart-eval tables out

      dart-eval tables out --view long

      dart-eval tables out --tasks arc,hellaswag

      dart-eval tables out --format json

      dart-eval tables out --format tex --save tables.tex
    """
    from dart_eval.cli.views import draw_frontier, print_view, render  # statistics, which `--help` does without

    store = Store(folder)
    picture = view == FRONTIER and save is not None and save.suffix in PICTURES
    if save is not None:
        check_target(save)
        format = None if picture else format_of(save, format, FORMATS)
    records = of_tasks(store.load(), tasks)
    if picture and save is not None:
        draw_frontier(store, records, save)
        return
    if format is None and save is None and (sys.stdout.isatty() or view == BOARD):
        print_view(view, store, records, subtasks)
        return
    form = format or "md"
    data = form in ("csv", "json")
    text = as_data(records, form, subtasks) if data else render(view, form, store, records, subtasks)
    if save is None:
        put(text)
    else:
        save_text(save, text)
