"""What `run` and `tables` show of a folder: the board, the long tables or the costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dart_eval.cli.options import COSTS
from dart_eval.cli.view import say
from dart_eval.results import board_table, speeds, tables
from dart_eval.results.board import Board, boards
from dart_eval.results.frame import lines
from dart_eval.results.record import Record
from dart_eval.results.show import Table
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import write


def boards_of(store: Store, records: Sequence[Record], metric: str | None = None) -> list[Board]:
    """Return the boards of some records of a folder, with its measured speeds.

    Raises:
        UserError: no cell has the metric.
    """
    known = {m.metric for r in records for m in r.metrics}
    if metric is not None and metric not in known:
        raise UserError(f"no cell has metric {metric!r}", nearest(metric, known))
    return boards(store, records, speeds.load_speeds(store.folder), metric)


def board(
    store: Store,
    records: Sequence[Record],
    metric: str | None = None,
    explain: bool = False,
    level: float | None = None,
) -> list[Table]:
    """Return the boards as tables; see `board_table.tables`."""
    return [table for one in boards_of(store, records, metric) for table in board_table.tables(one, explain, level)]


def long(view: str, store: Store, records: Sequence[Record], subtasks: bool) -> list[Table]:
    """Return the tables of a view that is not the board."""
    return [tables.costs(records)] if view == COSTS else tables.quality(lines(store, records, subtasks), records)


def draw(store: Store, records: Sequence[Record], metric: str | None, path: Path) -> None:
    """Draw quality against bytes read into a file.

    Raises:
        UserError: the folder has several models, or nothing that could be drawn.
    """
    every = boards_of(store, records, metric)
    if len(every) > 1:
        problem = f"{store.folder} has the results of several models"
        raise UserError(problem, "give each model an --output of its own to draw it")
    from dart_eval.results.report import charts  # matplotlib is loaded only where it draws

    picture = charts.draw(every[0], path.suffix[1:])
    if picture is None:
        weak = sorted({task for block in every[0].blocks for task in block.at_chance})
        why = f": dense is not above guessing on {', '.join(weak)}" if weak else ""
        raise UserError(f"{store.folder} has nothing to draw{why}", "run dense and a pruned method at several reads")
    write(path, picture)
    say(f"wrote {path}")
