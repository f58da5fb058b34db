"""The charts and the table of speeds of a board."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dart_eval.results import metrics
from dart_eval.results.blocks import Board, BoardRow
from dart_eval.results.board_text import sizes
from dart_eval.results.format import finite, number, percent, with_error
from dart_eval.results.record import Metric
from dart_eval.results.report.cells import flat
from dart_eval.results.report.charts import MOST_TIMES, Chart, Point, against_read, of_block
from dart_eval.results.writers import Table


def charts(board: Board, looks: Mapping[str, int], chance: Mapping[str, float]) -> list[Chart]:
    """Return the quality of each block relative to dense's, then each task's main metric, against weights read.

    Args:
        chance: task -> its accuracy under guessing.
    """
    made = [of_block(block, looks, sizes(board, block)) for block in board.blocks]
    rows = list({row.keys: row for row in board.rows}.values())
    for task, metric in board.columns.items():
        values = [(row, row.values[task]) for row in rows if task in row.values]
        guess = chance.get(task) if metrics.kind_of(metric).chance else None
        made.append(_chart(task, values, looks, guess))
    return [chart for chart in made if chart]


def _chart(
    task: str, values: Sequence[tuple[BoardRow, Metric]], looks: Mapping[str, int], chance: float | None
) -> Chart | None:
    lines: dict[str, list[Point]] = {}
    dense: list[Point] = []
    drawn = [(row, m) for row, m in values if finite(m.value)]
    for row, m in sorted(drawn, key=lambda v: (not flat(v[0]), looks.get(v[0].label, 0), -v[0].read)):
        half = 1.96 * m.stderr if finite(m.stderr) else 0.0
        text = f"{row.label} at {percent(row.read)}: {with_error(m.metric, m.value, m.stderr)}"
        (dense if flat(row) else lines.setdefault(row.label, [])).append(
            Point(row.read, m.value, m.value - half, m.value + half, text)
        )
    if not lines:
        return None
    ys, first = [m.value for _, m in drawn], drawn[0][1]
    log = metrics.kind_of(first.metric).group == metrics.PERPLEXITY and min(ys) > 0 and max(ys) > 10 * min(ys)
    sizes = sorted({m.n for _, m in drawn})
    bare = sum(not finite(m.stderr) for _, m in drawn)
    note = [
        first.metric, "lower is better" if first.higher_is_better is False else "", "logarithmic" if log else "",
        f"n {sizes[0]}" if len(sizes) == 1 else f"n {sizes[0]} to {sizes[-1]}",
        *(p.text.replace(" at 100 %:", "") for p in dense), "" if chance is None else f"guessing {number(chance)}",
        f"{len(values) - len(drawn)} without a finite value left out" if len(values) > len(drawn) else "",
        f"{bare} without a standard error" if bare else "",
    ]  # fmt: skip
    cap = (0.0, MOST_TIMES * (dense[0].value if dense else min(ys))) if log else (-math.inf, math.inf)
    return against_read(task, ", ".join(n for n in note if n), lines, looks, dense, chance, log, cap)


def speeds(board: Board) -> Table | None:
    """Return the decode speeds of a board's rows, where they were measured."""
    body = [
        [
            row.label, number(row.read, 2),
            f"{s.speedup.median:.2f}x [{s.speedup.low:.2f}, {s.speedup.high:.2f}]" if s.speedup else "none",
            f"{s.control.median:.2f}x" if s.control else "-", f"{s.ceiling:.2f}x",
            f"{s.device}, {s.hardware}, after {s.prompt_tokens} tokens",
        ]
        for row in {row.keys: row for row in board.rows}.values() if (s := row.speed)
    ]  # fmt: skip
    note = (
        "speed: of decoding, over dense, as dart-eval bench decode measured it [quartiles]. control: dense over dense, "
        "so speeds as near to 1 are noise. ceiling: the largest speed that the model's bytes allow. none: no "
        "kernel there turns the saved bytes into time."
    )
    heads = ["method", "read", "speed", "control", "ceiling", "measured on"]
    return Table("Speed", heads, body, note) if body else None
