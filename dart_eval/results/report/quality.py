"""What the charts and the table of speeds of a board hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dart_eval.results import metrics
from dart_eval.results.board import Board, Row
from dart_eval.results.format import finite, number, share, with_error
from dart_eval.results.record import Metric
from dart_eval.results.report.cells import flat
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


def speeds(board: Board) -> Table | None:
    """How fast the rows of a board decode, where that was measured."""
    body = [
        [
            row.label, share(row.read),
            f"{s.speedup.median:.2f}x [{s.speedup.low:.2f}, {s.speedup.high:.2f}]" if s.speedup else s.times,
            f"{s.control.median:.2f}x" if s.control else "-", f"{s.ceiling:.2f}x",
            f"{s.device}, {s.hardware}, after {s.prompt_tokens} tokens",
        ]
        for row in board.rows if (s := row.speed)
    ]  # fmt: skip
    note = (
        "speed: of decoding, over dense, as dart-eval bench decode measured it [quartiles]. control: dense over dense, "
        "so what is as near to 1 as that is noise. ceiling: the most that the bytes of the model allow. bytes only: no "
        "kernel there makes the bytes into time."
    )
    heads = ["method", "read", "speed", "control", "ceiling", "measured on"]
    return Table("Speed", heads, body, note) if body else None
