"""What the charts and the cost table of a board hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dart_eval.results import metrics
from dart_eval.results.board import Board, Row
from dart_eval.results.format import number, share, size, small_share, sparsity, with_error
from dart_eval.results.record import Metric
from dart_eval.results.report.cells import Cell, finite, flat
from dart_eval.results.report.charts import Chart, Point, draw, recoveries
from dart_eval.results.writers import Table


def charts(board: Board, looks: Mapping[str, int], chance: Mapping[str, float]) -> list[Chart]:
    """The mean recovery, then the main metric of each task, against what is read; none where there is no number.

    Args:
        chance: task -> its accuracy under guessing.
    """
    made = []
    if found := recoveries(board):
        words = [f"{name} keeps {p.value:.0f} % at read {share(p.read)}" for name in found for p in found[name]]
        level = Point(1, 100, 100, 100)
        note = "% of dense, mean over tasks"
        made.append(Chart("Recovery", note, "; ".join(words), lambda axes: draw(axes, found, looks, [level])))
    for task, metric in board.columns.items():
        values = [(row, row.values[task]) for row in board.rows if task in row.values]
        guess = chance.get(task) if metrics.of(metric).chance else None
        made += _chart(task, values, looks, guess)
    return made


def _chart(
    task: str, values: Sequence[tuple[Row, Metric]], looks: Mapping[str, int], chance: float | None
) -> list[Chart]:
    lines: dict[str, list[Point]] = {}
    dense: list[Point] = []
    words: list[str] = []
    drawn = [(row, m) for row, m in values if finite(m.value)]
    for row, m in sorted(drawn, key=lambda v: (not flat(v[0]), looks.get(v[0].label, 0), -v[0].read)):
        half = 1.96 * m.stderr if finite(m.stderr) else 0.0
        (dense if flat(row) else lines.setdefault(row.label, [])).append(
            Point(row.read, m.value, m.value - half, m.value + half)
        )
        at = "" if flat(row) else f" at read {share(row.read)}"
        words.append(f"{row.label}{at} {with_error(m.metric, m.value, m.stderr)}")
    if not lines:
        return []
    words += [f"guessing {number(chance)}"] if chance is not None else []
    ys, first = [m.value for _, m in drawn], drawn[0][1]
    log = metrics.of(first.metric).group == metrics.PERPLEXITY and min(ys) > 0 and max(ys) > 10 * min(ys)
    sizes = sorted({m.n for _, m in drawn})
    bare = sum(not finite(m.stderr) for _, m in drawn)
    note = [
        first.metric, "lower is better" if first.higher_is_better is False else "", "logarithmic" if log else "",
        f"n {sizes[0]}" if len(sizes) == 1 else f"n {sizes[0]} to {sizes[-1]}",
        f"{len(values) - len(drawn)} without a finite value left out" if len(values) > len(drawn) else "",
        f"{bare} without a standard error" if bare else "",
    ]  # fmt: skip
    return [Chart(
        task, ", ".join(n for n in note if n), "; ".join(words),
        lambda axes: draw(axes, lines, looks, dense, chance, log),
    )]  # fmt: skip


def costs(board: Board, cells: Sequence[Cell]) -> Table:
    """What each row of a board costs: FLOPs, overhead, extra memory, and speed where it was measured."""
    rows = board.rows
    timed = any(row.speed for row in rows)
    body = []
    for row in rows:
        ratios = [r for c in cells if c.row is row and (r := _flops(c)) is not None]
        ratio = sum(ratios) / len(ratios) if ratios else None
        line = [
            row.label, "-" if row.sparsity is None else sparsity(row.sparsity), share(row.read),
            "-" if ratio is None else share(ratio), small_share(row.overhead), size(row.memory),
        ]  # fmt: skip
        if timed:
            line += _speed(row)
        body.append(line)
    heads = ["method", "sparsity", "read", "FLOPs", "overhead", "extra memory"]
    note = (
        "FLOPs: of a decoded token over dense's, counted from shapes at the mean context, where pruned neurons are "
        "skipped. run itself multiplies by masks, which saves no time. overhead: FLOPs that the method adds to that, "
        "over those of a dense token. extra memory: kept beside the model for a sequence. "
    )
    if timed:
        heads += ["speed", "control", "ceiling", "measured on"]
        note += (
            "speed: of decoding, over dense, as dart-eval bench decode measured it [quartiles]. control: dense over "
            "dense, so what is as near to 1 as that is noise. ceiling: the most that the bytes of the model allow."
        )
    else:
        note += "Nothing here is a measured speed: that is what dart-eval bench decode is for."
    return Table("Costs", heads, body, note)


def _flops(cell: Cell) -> float | None:
    """FLOPs of a pruned decoding step / of a dense one."""
    dense, pruned = (cell.record.flops.get(f"decode_step_{side}") for side in ("dense", "pruned"))
    return pruned / dense if finite(dense) and finite(pruned) and dense > 0 else None


def _speed(row: Row) -> list[str]:
    s = row.speed
    if s is None:
        return ["-"] * 4
    return [
        f"{s.speedup.median:.2f}x [{s.speedup.low:.2f}, {s.speedup.high:.2f}]", f"{s.control.median:.2f}x",
        f"{s.ceiling:.2f}x", f"{s.device}, {s.hardware}, after {s.prompt_tokens} tokens",
    ]  # fmt: skip
