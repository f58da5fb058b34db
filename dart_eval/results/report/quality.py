"""What the charts and the cost table of a board hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dart_eval.results import frontier, metrics
from dart_eval.results.board import Board, Row
from dart_eval.results.format import number, share, size, small_share, sparsity, with_error
from dart_eval.results.record import Metric
from dart_eval.results.report.cells import Cell, finite, flat
from dart_eval.results.report.charts import Chart, Point, against_sparsity
from dart_eval.results.writers import Table


def frontier_chart(board: Board, looks: Mapping[str, int]) -> Chart | None:
    """Quality against what is read; None where nothing could be held against dense."""
    curves = frontier.curves(board)
    words = [
        f"{label} keeps {100 * r.recovery.value:.0f} % at read {share(r.read)}"
        for label, rows in curves.items()
        for r in rows
        if r.recovery is not None
    ]
    if not curves:
        return None
    note = "against the bytes read, with 95 % intervals"
    return Chart("Mean recovery", note, "; ".join(words), lambda axes: frontier.draw(axes, board, looks))


def against(cells: Sequence[Cell], looks: Mapping[str, int], chance: Mapping[str, float]) -> list[Chart]:
    """A chart a task and metric, of the cells of one board; none where no pruned cell has a number.

    Args:
        chance: task -> its accuracy under guessing.
    """
    found: dict[tuple[str, str], list[tuple[Row, Metric]]] = {}
    for cell in cells:
        for m in cell.record.metrics:
            if m.part_of is None and m.higher_is_better is not None and metrics.of(m.metric).drawn:
                found.setdefault((m.task, m.metric), []).append((cell.row, m))
    order = list(metrics.METRICS)
    charts = []
    for task, metric in sorted(found, key=lambda p: (p[0], order.index(p[1]) if p[1] in order else len(order), p[1])):
        same = [m for m in metrics.in_group(metrics.PERPLEXITY) if (task, m) in found]
        if metric in same[1:]:  # one number in other units
            continue
        guess = chance.get(task) if metrics.of(metric).chance else None
        chart = _chart(task, metric, found[task, metric], looks, guess)
        charts += [chart] if chart is not None else []
    return charts


def _chart(
    task: str, metric: str, values: Sequence[tuple[Row, Metric]], looks: Mapping[str, int], chance: float | None
) -> Chart | None:
    lines: dict[int, list[Point]] = {}
    levels: list[Point] = []
    words: list[str] = []
    drawn = [(row, m) for row, m in values if finite(m.value)]
    for row, m in sorted(drawn, key=lambda v: (not flat(v[0]), looks.get(v[0].label, 0), _x(v[0]))):
        point = Point(_x(row), m.value, 1.96 * m.stderr if finite(m.stderr) else 0.0)
        (levels if flat(row) else lines.setdefault(looks[row.label], [])).append(point)
        at = "" if flat(row) else f" at {sparsity(_x(row))}"
        words.append(f"{row.label}{at} {with_error(metric, m.value, m.stderr)}")
    if not lines:
        return None
    words += [f"guessing {number(chance)}"] if chance is not None else []
    ys = [m.value for _, m in drawn]
    log = metrics.of(metric).group == metrics.PERPLEXITY and min(ys) > 0 and max(ys) > 10 * min(ys)
    sizes = sorted({m.n for _, m in drawn})
    bare = sum(not finite(m.stderr) for _, m in drawn)
    note = [
        metric, "lower is better" if drawn[0][1].higher_is_better is False else "", "logarithmic" if log else "",
        f"n {sizes[0]}" if len(sizes) == 1 else f"n {sizes[0]} to {sizes[-1]}",
        f"{len(values) - len(drawn)} without a finite value left out" if len(values) > len(drawn) else "",
        f"{bare} without a standard error" if bare else "",
    ]  # fmt: skip
    return Chart(
        task, ", ".join(n for n in note if n), "; ".join(words),
        lambda axes: against_sparsity(axes, lines, levels, chance, log),
    )  # fmt: skip


def _x(row: Row) -> float:
    """The sparsity that a row stands at: what it does not read, where it was asked for none."""
    return row.sparsity if row.sparsity is not None else 1 - row.read


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
