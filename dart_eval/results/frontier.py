"""Quality against what it costs: the bytes that a decoded token reads, or the time that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dart_eval.results import metrics
from dart_eval.results.blocks import CONTROL, GUESSING, Block, Board, BoardRow
from dart_eval.results.format import multiple, percent
from dart_eval.results.speeds import unlike
from dart_eval.results.writers import Table

SHARES = (0.95, 0.9, 0.75)  # of dense's quality above guessing
TIMES = (1.05, 1.2, 2.0)  # multiples of dense's perplexity
Point = tuple[float, float]  # read, quality
Cost = Callable[[BoardRow], float | None]  # of a decoded token / dense's; None where it is not known


def bytes_read(row: BoardRow) -> float:
    """The bytes of FFN weights that a decoded token reads / dense's."""
    return row.read


def step_time(row: BoardRow) -> float | None:
    """The measured time of a decoded token / dense's."""
    return 1 / row.speed.speedup.median if row.speed and row.speed.speedup else None


def quality(block: Block, row: BoardRow) -> float | None:
    """Return a row's quality on the frontier: its share of dense's, or its perplexity as a multiple of dense's."""
    found = row.quality.get(next(iter(block.tasks), ""))
    if found is None or row.kind in (CONTROL, GUESSING):
        return None
    return found.share.value if found.share else found.times.value if by_times(block) and found.times else None


def by_times(block: Block) -> bool:
    """Whether the block's first metric is a perplexity."""
    return metrics.kind_of(next(iter(block.tasks), "")).group == metrics.PERPLEXITY


def curves(block: Block, cost: Cost = bytes_read) -> dict[str, list[tuple[float, BoardRow]]]:
    """Return method -> the costs and rows that have a quality beside dense's, from the highest cost to the lowest."""
    found: dict[str, list[tuple[float, BoardRow]]] = {}
    for row in block.rows:
        if quality(block, row) is not None and (at := cost(row)) is not None:
            found.setdefault(row.label, []).append((at, row))
    return {label: sorted(rows, key=lambda r: -r[0]) for label, rows in sorted(found.items())}


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
                points = [(at, q) for at, r in rows if (q := quality(block, r)) is not None]
                measured = [f"{percent(read)}: {multiple(q) if down else percent(q)}" for read, q in points]
                wanted = TIMES if down else SHARES
                cells = [reach(points, [q <= k if down else q >= k for _, q in points]) for k in wanted]
                body.append([label, ", ".join(measured), *cells])
            if body:
                heads = [f"{multiple(k)} or less" for k in TIMES] if down else [f"{percent(k)} or more" for k in SHARES]
                what = SAID.get(of := _what(block), of)
                note = (
                    f"{what} at each measured read, on {_tasks(block)}. Columns: the lowest read at which the "
                    "method still has that quality; between measured points the exact read is unknown. These are point "
                    "estimates: the board shows their intervals."
                )
                made.append(Table(f"Frontier of {board.model}", ["method", "measured", *heads], body, note))
    return made


def by_time(boards: Sequence[Board]) -> list[Table]:
    """Return quality beside the time of a decoded token, the fastest row first, one table per block with speeds."""
    made = [_by_time(board.model, block) for board in boards for block in board.blocks]
    return [table for table in made if table.body]


def _by_time(model: str, block: Block) -> Table:
    down, body, best, better = by_times(block), list[list[str]](), None, "-"
    timed = [row for rows in curves(block, step_time).values() for row in rows]
    for at, row in sorted(timed, key=lambda r: r[0]):
        if at > 1 and (best is None or (best > 1 if down else best < 1)):  # dense is faster, and better so far
            best, better = 1.0, f"dense ({multiple(1.0) if down else percent(1.0)})"
        found, ratio = quality(block, row), row.speed.speedup if row.speed else None
        assert found is not None and ratio is not None  # a row of `curves`
        ahead = best is None or (found < best if down else found > best)
        text = multiple(found) if down else percent(found)
        kl = "-" if row.kl is None else f"{row.kl.value:.3g}"
        speed = multiple(ratio.median, ratio.low, ratio.high)
        body.append([row.name, percent(row.read), percent(at), speed, text, kl, "" if ahead else better])
        if ahead:
            best, better = found, f"{row.name} ({text})"
    rest = [row.name for row in block.rows if step_time(row) is None and quality(block, row) is not None]
    what = _what(block)
    note = [
        f"step time: a decoded token's / dense's; speed: its inverse [quartiles]. {what}: on {_tasks(block)}. "
        "faster and better: the best faster row, if it is at least as good; no faster row beats a row with an empty "
        "cell, apart from noise.",
        *unlike(row.speed for _, row in timed), *([f"Without a speed: {', '.join(rest)}."] if rest else []),
    ]  # fmt: skip
    heads = ["method", "read", "step time", "speed", what, "KL", "faster and better"]
    return Table(f"Quality at equal time, {model}", heads, body, " ".join(note))


SAID = {"above guessing": "share of what dense has above guessing", "of dense": "share of dense's quality"}


def _what(block: Block) -> str:
    """The head of a row's quality beside dense's."""
    guessing = metrics.kind_of(next(iter(block.tasks), "")).chance
    return "perplexity x dense" if by_times(block) else "above guessing" if guessing else "of dense"


def _tasks(block: Block) -> str:
    """The tasks of a block's first metric."""
    return ", ".join(next(iter(block.tasks.values()), ()))
