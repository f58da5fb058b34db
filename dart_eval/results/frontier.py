"""Quality against bytes read: how far down a method keeps 99, 95 and 90 % of dense."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.results.board import Board, Row
from dart_eval.results.format import sparsity
from dart_eval.results.writers import Table

KEPT = (0.99, 0.95, 0.90)  # of dense's quality
Point = tuple[float, float]  # read, recovery


def curves(board: Board) -> dict[str, list[Row]]:
    """Method -> its rows that have a recovery, from the highest read to the lowest."""
    found: dict[str, list[Row]] = {}
    for row in board.rows:
        if row.recovery is not None:
            found.setdefault(row.label, []).append(row)
    return {label: sorted(rows, key=lambda r: -r.read) for label, rows in sorted(found.items())}


def reach(points: Sequence[Point], kept: float) -> tuple[float, bool]:
    """The least read at which a curve from dense, (1, 1), still keeps a share of quality, and whether it was crossed.

    Between two measured points the curve is taken to be a line; beyond the last nothing is known.

    Args:
        points: from the highest read to the lowest.
    """
    read, quality = 1.0, 1.0
    for next_read, next_quality in points:
        if next_quality < kept:
            share = (quality - kept) / (quality - next_quality)
            return read + share * (next_read - read), True
        read, quality = next_read, next_quality
    return read, False


def tables(boards: Sequence[Board]) -> list[Table]:
    """How far each method can go, one table a model."""
    made = []
    for board in boards:
        body = []
        for label, rows in curves(board).items():
            points = [(r.read, r.recovery.value) for r in rows if r.recovery is not None]
            cells = []
            for kept in KEPT:
                read, crossed = reach(points, kept)
                cells.append(("" if crossed else "at least ") + sparsity(round(1 - read, 3)))
            body.append([label, ", ".join(f"{r:.2f}" for r, _ in points), *cells])
        columns = ["method", "measured at read", *(f"keeps {100 * k:.0f} %" for k in KEPT)]
        note = (
            "The sparsity up to which a method keeps so much of dense's quality (mean recovery over tasks). Between "
            "two measured levels the recovery is taken to fall in a line. at least: it was still above at the last "
            "one. These are single values; the board shows how uncertain they are."
        )
        made.append(Table(f"Frontier of {board.model}", columns, body, note))
    return made
