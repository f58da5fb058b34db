"""Quality against bytes read: how far down a method keeps 99, 95 and 90 % of dense."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from dart_eval.results.board import Board, Row
from dart_eval.results.format import sparsity
from dart_eval.results.writers import Table

KEPT = (0.99, 0.95, 0.90)  # of dense's quality
MARKERS = "os^Dv<>P*X"
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


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a method in a chart."""
    return {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def draw(axes: Any, board: Board, looks: Mapping[str, int]) -> None:
    """Draw the mean recovery of every method against what it reads, with 95 % intervals.

    Args:
        looks: label -> the number of its look.
    """
    axes.axhline(100, color="0.6", linewidth=0.8)
    for i, (label, rows) in enumerate(curves(board).items()):
        aside = 0.003 * (i % 2 * 2 - 1) * ((i + 1) // 2)  # so that intervals do not hide each other
        found = [r.recovery for r in rows if r.recovery is not None]
        spans = [[100 * abs(e.value - (e.interval or (e.value, e.value))[end]) for e in found] for end in (0, 1)]
        axes.errorbar(
            [r.read + aside for r in rows], [100 * e.value for e in found], yerr=spans, label=label,
            **look(looks[label]), linewidth=1.2, elinewidth=0.8, capsize=2,
            linestyle="-" if rows[0].kind == "pruned" else "--",
        )  # fmt: skip
    axes.set_xlim(1.02, 0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("read: share of the FFN weight bytes")
    axes.set_ylabel("mean recovery, % of dense")


def picture(board: Board, form: str) -> bytes:
    """The frontier as a file of its own.

    Args:
        form: `png`, `svg` or `pdf`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kept = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "dart-eval", "text.parse_math": False}):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, board, {label: i for i, label in enumerate(curves(board))})
        axes.set_title(board.model, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
        metadata = {"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else {}
        figure.savefig(kept, format=form, dpi=150, metadata=metadata)
    return kept.getvalue()
