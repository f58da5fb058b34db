"""What `run` and `tables` show of a folder: the board, the long tables or the costs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

from dart_eval.cli.options import BOARD, COSTS
from dart_eval.cli.view import say, show
from dart_eval.results import board_text, frame, speeds, tables, writers
from dart_eval.results.blocks import WIDTH_OF_LEVEL, Board
from dart_eval.results.board import boards, by_row
from dart_eval.results.board_text import LEVEL_SHOWN
from dart_eval.results.inputs import DENSE
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.results.writers import Table
from dart_eval.util.bits import LAST_BITS
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import write

PLAIN_WIDTH = 100  # characters of a board where there is no terminal


@dataclass(frozen=True)
class Shown:
    """A view of some records of a folder, and the look of its board."""

    view: str
    store: Store
    records: Sequence[Record]
    subtasks: bool = False
    metric: str | None = None
    level: float | None = None
    sort: str | None = None
    explain: bool = False

    @cached_property
    def boards(self) -> list[Board]:
        """The boards of the folder.

        Raises:
            UserError: no cell has the metric.
        """
        if self.metric is not None:
            known = {m.metric.partition(",")[0] for r in self.records for m in r.metrics}
            if self.metric not in known:
                raise UserError(f"no cell has metric {self.metric!r}", nearest(self.metric, known))
        return boards(self.store, self._near(), speeds.load_speeds(self.store.folder), self.metric)

    def _near(self) -> list[Record]:
        """Return the cells of dense and of rounding, and of rows whose read, a mean over tasks, is near the level."""
        if self.level is None:
            return [*self.records]
        most = LEVEL_SHOWN + WIDTH_OF_LEVEL
        return [
            r for some in by_row(self.records).values() for r in some
            if r.inputs["method"] == DENSE or r.settings.get("granularity") == LAST_BITS
            or abs(mean(c.weights_read for c in some) - self.level) <= most
        ]  # fmt: skip

    @property
    def long(self) -> list[Table]:
        """The tables of a view that is not the board."""
        if self.view == COSTS:
            return [tables.costs(self.records)]
        return tables.quality(self.records, frame.lines(self.store, self.records, self.subtasks))


def print_view(shown: Shown) -> None:
    """Print a view, its board as wide as the terminal."""
    if shown.view != BOARD:
        for table in shown.long:
            show(table)
            print()
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
    for board in shown.boards:
        for line in board_text.lines(board, width, shown.explain, shown.sort, shown.level):
            say(line)
        say("")


def render(shown: Shown, form: str) -> str:
    """Return a view as Markdown or LaTeX."""
    of_board = (table for board in shown.boards for table in board_text.table(board, shown.sort, shown.level))
    writer = writers.markdown if form == "md" else writers.latex
    return "\n".join(map(writer, of_board if shown.view == BOARD else shown.long))


def as_data(shown: Shown, form: str) -> str:
    """Return every number beside dense's, as csv or json."""
    return writers.data_text(frame.lines(shown.store, shown.records, shown.subtasks), form)


def draw(shown: Shown, path: Path) -> None:
    """Draw quality against bytes read into a file.

    Raises:
        UserError: the folder has several models, or nothing that could be drawn.
    """
    if len(shown.boards) > 1:
        problem = f"{shown.store.folder} has the results of several models"
        raise UserError(problem, "give each model an --output of its own to draw it")
    from dart_eval.results.report import charts  # matplotlib is loaded only where it draws

    (board,) = shown.boards
    if not any(charts.curves(block) for block in board.blocks):
        problem, remedy = f"{shown.store.folder} has nothing to draw", "run dense and a pruned method on the same tasks"
        if weak := sorted({task for block in board.blocks for task in block.at_chance}):
            problem += f": dense is not above guessing on {', '.join(weak)}"
            remedy = "raise --limit, or take other tasks"
        raise UserError(problem, remedy)
    write(path, charts.picture(board, path.suffix[1:]))
    say(f"wrote {path}")
