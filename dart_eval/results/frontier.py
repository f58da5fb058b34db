"""Quality against bytes read: the least read at which a method keeps a share of dense's quality."""

from __future__ import annotations

from collections.abc import Sequence

from dart_eval.results import metrics
from dart_eval.results.blocks import CONTROL, GUESSING, Block, Board, BoardRow
from dart_eval.results.format import multiple, percent
from dart_eval.results.writers import Table

SHARES = (0.95, 0.9, 0.75)  # of dense's quality above guessing
TIMES = (1.05, 1.2, 2.0)  # multiples of dense's perplexity
Point = tuple[float, float]  # read, quality


def quality(block: Block, row: BoardRow) -> float | None:
    """Return a row's quality on the frontier: its share of dense's, or its perplexity as a multiple of dense's."""
    found = row.quality.get(next(iter(block.tasks), ""))
    if found is None or row.kind in (CONTROL, GUESSING):
        return None
    return found.share.value if found.share else found.times[0] if by_times(block) and found.times else None


def by_times(block: Block) -> bool:
    """Whether the block's first metric is a perplexity."""
    return metrics.kind_of(next(iter(block.tasks), "")).group == metrics.PERPLEXITY


def curves(block: Block) -> dict[str, list[BoardRow]]:
    """Return method -> its rows with a quality beside dense's, from the highest read to the lowest."""
    found: dict[str, list[BoardRow]] = {}
    for row in block.rows:
        if quality(block, row) is not None:
            found.setdefault(row.label, []).append(row)
    return {label: sorted(rows, key=lambda r: -r.read) for label, rows in sorted(found.items())}


def reach(points: Sequence[Point], holds: Sequence[bool]) -> str:
    """Return the least read at which a method still keeps enough, from measured points.

    Between two points the quality is not known: `30 % to 50 %` is a read between the last point that holds and the next
    one, which does not.

    Args:
        points: from the highest read to the lowest.
        holds: whether each point keeps enough.
    """
    lost = next((i for i, one in enumerate(holds) if not one), None)
    if lost is None:
        return f"{percent(points[-1][0])} or less"
    least = percent(points[lost][0])
    return f"above {least}" if lost == 0 else f"{least} to {percent(points[lost - 1][0])}"


def tables(boards: Sequence[Board]) -> list[Table]:
    """Return how far each method can go, one table per block of a board."""
    made = []
    for board in boards:
        for block in board.blocks:
            down, body = by_times(block), []
            for label, rows in curves(block).items():
                points = [(r.read, q) for r in rows if (q := quality(block, r)) is not None]
                measured = [f"{percent(read)}: {multiple(q) if down else percent(q)}" for read, q in points]
                wanted = TIMES if down else SHARES
                cells = [reach(points, [q <= k if down else q >= k for _, q in points]) for k in wanted]
                body.append([label, ", ".join(measured), *cells])
            if body:
                heads = [f"{multiple(k)} or less" for k in TIMES] if down else [f"{percent(k)} or more" for k in SHARES]
                what = "perplexity x dense" if down else "share of what dense has above guessing"
                tasks = ", ".join(task for some in list(block.tasks.values())[:1] for task in some)
                note = (
                    f"{what} at each measured read, on {tasks}. Columns: the FFN bytes read at which the method still "
                    "has that; between two measured points it is not known where. These are point estimates: the board "
                    "shows their intervals."
                )
                made.append(Table(f"Frontier of {board.model}", ["method", "measured", *heads], body, note))
    return made
