"""What `run` and `tables` show of a folder: the board, or one of the long tables."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from dart_eval.bench import kept
from dart_eval.cli.tables import ALL, BOARD, FRONTIER
from dart_eval.cli.view import say, show
from dart_eval.errors import UserError
from dart_eval.files import write
from dart_eval.results import board_text, detector, frontier, generated, tables, writers
from dart_eval.results.board import Board, boards
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.results.writers import Table

PLAIN_WIDTH = 100  # characters of a board where there is no terminal


def print_view(view: str, store: Store, records: Sequence[Record], subtasks: bool = False) -> None:
    """A view for the terminal, the board as wide as that is; `all` is the board and every long table."""
    made, long = _view(view, store, records, subtasks)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
    for board in made:
        for line in board_text.lines(board, width):
            fits = len(line) <= width or line.startswith(("*", "~", " "))
            say("\n".join([line] if fits else textwrap.wrap(line, width, break_on_hyphens=False)))
        say("")
    for table in long:
        show(table)
        print()


def render(view: str, form: str, store: Store, records: Sequence[Record], subtasks: bool = False) -> str:
    """A view as Markdown or LaTeX."""
    made, long = _view(view, store, records, subtasks)
    writer = writers.markdown if form == "md" else writers.latex
    return "\n".join(writer(table) for table in [*map(board_text.table, made), *long])


def _view(view: str, store: Store, records: Sequence[Record], subtasks: bool) -> tuple[list[Board], list[Table]]:
    """The boards and the tables of a view."""
    # Only these views take the samples of all cells.
    made = boards(store, records, kept.read(store.folder)) if view in (BOARD, FRONTIER, ALL) else []
    found: list[Table] = []
    if view in ("long", ALL):
        found += tables.quality(records, subtasks)
    if view in ("flops", ALL):
        found.append(tables.flops(records))
    if view in ("memory", ALL):
        found.append(tables.memory(records))
    if view in ("detector", ALL):
        found += [*generated.tables(store, records), *detector.tables(store, records)]
    if view in (FRONTIER, ALL):
        found += frontier.tables(made)
    return [] if view == FRONTIER else made, found


def draw_frontier(store: Store, records: Sequence[Record], path: Path) -> None:
    """Draw quality against bytes read into a file that can be written.

    Raises:
        UserError: the folder has several models, or nothing that could be drawn.
    """
    made = boards(store, records)
    if len(made) > 1:
        problem = f"{store.folder} has the results of several models"
        raise UserError(problem, "give each model an --output of its own to draw it")
    if not frontier.curves(made[0]):
        problem = f"there is nothing to draw in {store.folder}"
        raise UserError(problem, "run dense and a pruned method on the same tasks")
    from dart_eval.results.report import charts  # matplotlib is loaded only where it draws

    write(path, charts.picture(made[0], path.suffix[1:]))
    say(f"wrote {path}")
