"""Charts of quality against sparsity, and against cost: which points they hold and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dart_eval.results import metrics
from dart_eval.results.record import Metric, Record
from dart_eval.results.report.cells import DENSE, Cells, find, half_width, main_metrics
from dart_eval.results.report.charts import Level, Line, Point
from dart_eval.results.report.text import finite, percent, sparsity, with_error


@dataclass(frozen=True)
class Panel:
    """One chart: heads, what it holds in words, its lines and levels."""

    title: str
    note: str
    words: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    log: bool = False
    tops: tuple[tuple[float, str], ...] = ()


@dataclass
class Group:
    """The charts of one kind of quality for one model."""

    title: str
    panels: list[Panel] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        """Kinds of levels in the charts."""
        return {level.kind for panel in self.panels for level in panel.levels}

    @property
    def styles(self) -> set[int]:
        """Series in the charts."""
        return {line.style for panel in self.panels for line in panel.lines}


def against_sparsity(cells: Cells, model: str, chance: dict[str, float]) -> list[Group]:
    """Charts of a model, grouped as the tables are; tasks without a pruned cell have none.

    chance: value of accuracy under guessing, of the tasks where it is known.
    """
    records = [r for r in cells.records if r.inputs["model"]["name"] == model]
    groups = {title: Group(title.split(" (")[0]) for title in metrics.GROUPS}
    order = list(metrics.METRICS)
    seen = {(m.task, m.metric) for r in records for m in r.metrics if m.part_of is None and _charted(m)}
    for task, metric in sorted(seen, key=lambda s: (s[0], order.index(s[1]) if s[1] in order else len(order), s[1])):
        if _repeats(metric, {m for t, m in seen if t == task}):
            continue
        panel = _panel(cells, records, task, metric, chance)
        if panel is not None:
            groups[metrics.of(metric).group].panels.append(panel)
    return [g for g in groups.values() if g.panels]


def _charted(m: Metric) -> bool:
    return m.higher_is_better is not None and metrics.of(m.metric).drawn


def _repeats(metric: str, beside: set[str]) -> bool:
    """Perplexities of one task are one number in other units: the first is drawn."""
    present = [p for p in metrics.in_group(metrics.PERPLEXITY) if p in beside]
    return metric in present[1:]


def _panel(cells: Cells, records: Sequence[Record], task: str, metric: str, chance: dict[str, float]) -> Panel | None:
    by_label: dict[str, list[tuple[float, Metric]]] = {}
    levels, words, counts, dropped, bare = [], [], set(), 0, 0
    better: bool | None = True
    for r in records:
        m = next((m for m in r.metrics if (m.task, m.metric) == (task, metric)), None)
        if m is None:
            continue
        better, label = m.higher_is_better, cells.labels[r.key]
        if not finite(m.value):
            dropped += 1
            continue
        counts.add(m.n)
        bare += half_width(m) is None
        if r.inputs["method"] == DENSE:
            levels.append(Level(m.value, half_width(m)))
            words.append(f"{label} {with_error(m.value, m.stderr)}")
        else:
            by_label.setdefault(label, []).append((r.inputs["sparsity"], m))
    if not by_label:
        return None
    lines = []
    for label, found in sorted(by_label.items()):
        found.sort(key=lambda f: f[0])
        lines.append(Line(cells.styles[label], tuple(Point(s, m.value, half_width(m)) for s, m in found)))
        words += [f"{label} at {sparsity(s)} {with_error(m.value, m.stderr)}" for s, m in found]
    if metrics.of(metric).chance and task in chance:
        levels.append(Level(chance[task], kind="chance"))
    values = [p.y for line in lines for p in line.points] + [level.value for level in levels]
    note = [metric, "lower is better" if better is False else "", f"n = {_range(counts)}"]
    note += [f"{dropped} without a finite value left out"] if dropped else []
    if bare:
        note.append("no intervals: no standard error" if bare == len(words) else f"{bare} without interval")
    log = metrics.of(metric).group == metrics.PERPLEXITY and min(values) > 0 and max(values) > 10 * min(values)
    note += ["logarithmic"] if log else []
    return Panel(task, ", ".join(n for n in note if n), "; ".join(words), tuple(lines), tuple(levels), log)


def against_cost(cells: Cells, model: str) -> list[Panel]:
    """Quality and FLOPs per decoded token as shares of dense, a chart a task (its main metric)."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float, Point]]]] = {}
    for r in cells.pruned:
        share = decode_share(r)
        if r.inputs["model"]["name"] != model or share is None:
            continue
        for m in main_metrics(r):
            dense = find(cells.dense(r), m)
            point = _relative(m, dense, share) if dense else None
            if point is not None:
                line = found.setdefault((m.task, m.metric), {}).setdefault(cells.labels[r.key], [])
                line.append((r.inputs["sparsity"], pruned_share(r) or share, point))
    panels = []
    for (task, metric), lines in sorted(found.items()):
        drawn, words = [], []
        tops: dict[float, tuple[float, str]] = {}
        for label, points in sorted(lines.items()):
            points.sort(key=lambda p: (p[0], p[2].x))
            drawn.append(Line(cells.styles[label], tuple(p for _, _, p in points)))
            words += [f"{label} at {sparsity(s)}: {percent(p.y)} of dense at {percent(p.x, 1)} of its FLOPs"
                      for s, _, p in points]  # fmt: skip
            for s, pure, _ in points:
                tops.setdefault(s, (pure, f"{100 * s:.4g} %\n≤ {1 / pure:.2f}×"))
        note = f"{metric} relative to dense" + (
            " (dense / value)" if metrics.of(metric).group == metrics.PERPLEXITY else ""
        )
        panels.append(Panel(task, note, "; ".join(words), tuple(drawn), tops=tuple(sorted(tops.values()))))
    return panels


def pruned_share(record: Record) -> float | None:
    """FLOPs of a pruned decoding step / of a dense one: 1 - phi s."""
    dense, pruned = record.flops.get("decode_step_dense"), record.flops.get("decode_step_pruned")
    return pruned / dense if finite(dense) and finite(pruned) and dense > 0 and pruned > 0 else None


def decode_share(record: Record) -> float | None:
    """The same with what the method itself adds."""
    share, added = pruned_share(record), record.flops.get("overhead_share", 0.0)
    return None if share is None else share + (added if finite(added) else 0.0)


def _relative(m: Metric, dense: Metric, share: float) -> Point | None:
    """Value / dense (the inverse where lower is better), with the interval of a ratio of independent estimates."""
    if not (finite(m.value) and finite(dense.value)) or not (m.value if m.higher_is_better is False else dense.value):
        return None
    top, bottom = (m, dense) if m.higher_is_better else (dense, m)
    ratio = top.value / bottom.value
    if not (finite(top.stderr) and finite(bottom.stderr)):
        return Point(share, ratio)
    return Point(share, ratio, 1.96 * math.hypot(top.stderr, ratio * bottom.stderr) / abs(bottom.value))


def _range(counts: set[int]) -> str:
    return "-" if not counts else f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
