"""`dart-eval tables`: the tables of a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli import complete
from dart_eval.cli.view import put, save_text
from dart_eval.errors import UserError, nearest
from dart_eval.files import check_target, format_of
from dart_eval.results import tables as made
from dart_eval.results.store import Store


def _views() -> tuple[str, ...]:
    from dart_eval.cli.views import VIEWS

    return VIEWS


Format = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Print md, csv, tex or json. Without it the ending of --save says which. The board is always drawn, 100 "
        "columns wide in a pipe; other tables are drawn on a terminal, and a pipe gets md.",
        autocompletion=complete.words(made.FORMATS),
    ),
]
View = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=complete.words(_views),
        help="Show this view. board; long: every metric with n; flops; memory; detector: drift and false alarms; "
        "frontier: how far a method can go (--save FILE.svg draws it); all. json and csv hold every number, whatever "
        "the view.",
    ),
]
Subtasks = Annotated[
    bool, typer.Option("--subtasks", metavar="", help="Show also the members of groups, such as mmlu's subjects.")
]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file instead of the terminal.")]


def tables(
    folder: Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")] = Path("out"),
    format: Format = None,
    view: View = "board",
    subtasks: Subtasks = False,
    save: Save = None,
) -> None:
    """Print the board of a folder of results: one row a method and sparsity, best first, or the long tables behind it.

    [bold]Examples[/bold]

      dart-eval tables out

      dart-eval tables out --view long

      dart-eval tables out --format json

      dart-eval tables out --format tex --save tables.tex
    """
    # Statistics, which `--help` does without.
    from dart_eval.cli.views import BOARD, FRONTIER, PICTURES, VIEWS, draw_frontier, print_view, render

    if format is not None and format not in made.FORMATS:
        raise UserError(f"unknown format {format!r}", nearest(format, made.FORMATS))
    if view not in VIEWS:
        raise UserError(f"there is no view {view!r}", nearest(view, VIEWS))
    if view == FRONTIER and save is not None and save.suffix in PICTURES:
        draw_frontier(Store(folder), save)
        return
    if save is not None:
        check_target(save)
        format = format_of(save, format, made.FORMATS)
    store = Store(folder)
    records = store.load()
    if format is None and save is None and (sys.stdout.isatty() or view == BOARD):
        print_view(view, store, records, subtasks)
        return
    form = format or "md"
    text = (
        made.render(records, form, subtasks)
        if form in ("csv", "json")
        else render(view, form, store, records, subtasks)
    )
    if save is None:
        put(text)
        return
    save_text(save, text)
