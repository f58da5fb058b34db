"""What `run` and `tables` show of a folder: the board, or one of the long tables."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from dart_eval.bench import kept
from dart_eval.cli.view import say, show
from dart_eval.errors import UserError
from dart_eval.files import check_target, write
from dart_eval.results import board_text, detector, frontier, tables, writers
from dart_eval.results.board import Board, boards
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.results.writers import Table

BOARD, FRONTIER = "board", "frontier"
PICTURES = (".png", ".svg", ".pdf")
PLAIN_WIDTH = 100  # characters of a board where there is no terminal
LONG: dict[str, Callable[[Store, Sequence[Record], bool], Sequence[Table]]] = {
    "long": lambda store, records, subtasks: tables.quality(records, subtasks),
    "flops": lambda store, records, subtasks: [tables.flops(records)],
    "memory": lambda store, records, subtasks: [tables.memory(records)],
    "detector": lambda store, records, subtasks: detector.tables(store, records),
}
VIEWS = (BOARD, *LONG, FRONTIER, "all")


def print_board(store: Store, records: Sequence[Record]) -> None:
    """The board of records, as wide as the terminal."""
    _print(boards(store, records, kept.read(store.folder)))


def _print(made: Sequence[Board]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
    for board in made:
        for line in board_text.lines(board, width):
            fits = len(line) <= width or line.startswith(("*", "~", " "))
            say("\n".join([line] if fits else textwrap.wrap(line, width, break_on_hyphens=False)))
        say("")


def print_view(view: str, store: Store, records: Sequence[Record], subtasks: bool = False) -> None:
    """A view for the terminal; `all` is the board and every long table."""
    made = _boards(view, store, records)
    if view != FRONTIER:
        _print(made)
    for table in _tables(view, store, records, subtasks, made):
        show(table)
        print()


def render(view: str, form: str, store: Store, records: Sequence[Record], subtasks: bool = False) -> str:
    """A view as Markdown or LaTeX."""
    made = _boards(view, store, records)
    first = [board_text.table(board) for board in made] if view != FRONTIER else []
    writer = writers.markdown if form == "md" else writers.latex
    return "\n".join(writer(t) for t in [*first, *_tables(view, store, records, subtasks, made)])


def draw_frontier(store: Store, path: Path) -> None:
    """Draw quality against bytes read into a file.

    Raises:
        UserError: the folder has several models, or nothing that could be drawn.
    """
    check_target(path)
    made = boards(store, store.load())
    if len(made) > 1:
        raise UserError(
            f"{store.folder} has the results of several models", "give each model an --output of its own to draw it"
        )
    if not frontier.curves(made[0]):
        raise UserError(
            f"there is nothing to draw in {store.folder}", "run dense and a pruned method on the same tasks"
        )
    write(path, frontier.picture(made[0], path.suffix[1:]))
    say(f"wrote {path}")


def _boards(view: str, store: Store, records: Sequence[Record]) -> list[Board]:
    """The boards, for the views that need them: they take the samples of all cells."""
    return boards(store, records, kept.read(store.folder)) if view in (BOARD, FRONTIER, "all") else []


def _tables(view: str, store: Store, records: Sequence[Record], subtasks: bool, made: Sequence[Board]) -> list[Table]:
    """The long tables of a view; made: the boards."""
    chosen = [make for name, make in LONG.items() if view in (name, "all")]
    found = [table for make in chosen for table in make(store, records, subtasks)]
    return [*found, *(frontier.tables(made) if view in (FRONTIER, "all") else [])]
