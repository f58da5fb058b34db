"""Charts as inline SVG. Knows numbers and styles only: whatever has a name is written in HTML beside the chart.

No text from outside reaches matplotlib (it reads `$` as mathematics), and colours are placeholders that `svg.embed`
replaces by the page's variables, so that a chart follows the light or dark scheme.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dart_eval.results.report.svg import ALARM, GRID, INK, MUTED, SERIES, embed, series_colour

WIDTH, HEIGHT = 4.7, 3.0  # inches of 72 units: about the pixels that a chart gets on the page
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "dart-eval", "font.family": "DejaVu Sans", "font.size": 11,
    "axes.unicode_minus": True, "path.simplify": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "grid.linewidth": 0.8, "axes.linewidth": 0.8, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
    "lines.linewidth": 1.7, "lines.markersize": 5.5,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value and half the width of its interval (None: it has none)."""

    x: float
    y: float
    half: float | None = None


@dataclass(frozen=True)
class Line:
    """Points of one series; `style` numbers its colour, marker and dashes."""

    style: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Level:
    """A horizontal line with its band. `kind`: `dense` or `chance`."""

    value: float
    half: float | None = None
    kind: str = "dense"


def against_sparsity(lines: Sequence[Line], levels: Sequence[Level], log: bool = False, prefix: str = "c") -> str:
    """Values against sparsity (shares), one line a method, dense as a level."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure()
        xs = sorted({p.x for line in lines for p in line.points})
        low, high = (xs[0], xs[-1]) if xs else (0.0, 1.0)
        reach = (high - low) or 0.2
        margin = 0.12 * reach if high > low else 0.1
        axes.set_xlim(low - margin, high + margin)
        _levels(axes, levels)
        for i, line in enumerate(lines):  # a step aside each, so that intervals do not hide each other
            shift = (i - (len(lines) - 1) / 2) * min(0.022 * reach, 0.12 * reach / len(lines))
            _line(axes, line, shift, log)
        axes.set_xticks(_thinned(xs, 0.09 * (reach + 2 * margin)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g} %"))
        axes.set_xlabel("sparsity asked for")
        _vertical(axes, log)
        values = [*(p.y for line in lines for p in line.points), *(level.value for level in levels)]
        if values and min(values) >= 0 and not log:
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # no axis below zero for the sake of an interval
        return _svg(figure, prefix)


def cost_quality(lines: Sequence[Line], tops: Sequence[tuple[float, str]], prefix: str = "c") -> str:
    """Quality against FLOPs per decoded token, both as shares of dense; `tops` are ticks of the upper axis."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure()
        xs = [p.x for line in lines for p in line.points]
        low, high = min([*xs, 1.0]), max([*xs, 1.0])
        margin = 0.08 * ((high - low) or 0.2)
        axes.set_xlim(low - margin, high + margin)
        axes.axhline(1.0, color=INK, linewidth=1, alpha=0.55)
        axes.plot([1.0], [1.0], marker="o", color=INK, markersize=5.5, linestyle="none")
        for i, line in enumerate(lines):
            _line(axes, line, (i - (len(lines) - 1) / 2) * 0.1 * margin, False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g} %"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g} %"))
        axes.set_xlabel("FLOPs per decoded token, of dense")
        axes.set_ylabel("quality, of dense")
        _vertical(axes, False, keep_format=True)
        kept = _thinned([x for x, _ in tops], 0.17 * (high - low + 2 * margin))
        if kept:
            upper = axes.secondary_xaxis("top")
            upper.set_xticks(kept, [dict(tops)[x] for x in kept])
            upper.tick_params(length=3, labelsize=9.5)
            upper.spines["top"].set_visible(False)
        return _svg(figure, prefix)


def trace(signal: Sequence[float | None], window: int, threshold: float | None, remasks: Sequence[float],
          style: int, prefix: str = "c") -> str:  # fmt: skip
    """The drift signal of one document over its windows, the threshold, and its re-masks."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(height=2.5)
        ends = [(i + 1) * window for i in range(len(signal))]
        values = [math.nan if s is None else s for s in signal]
        for x in remasks:
            axes.axvline(x, color=ALARM, linewidth=1.3, linestyle=(0, (2, 2)))
        if threshold is not None:
            axes.axhline(threshold, color=INK, linewidth=1, alpha=0.7, linestyle=(0, (6, 3)))
        axes.plot(ends, values, color=series_colour(style), marker=MARKERS[style % len(MARKERS)], markersize=4)
        if remasks:
            axes.plot(remasks, [1.0] * len(remasks), transform=axes.get_xaxis_transform(), marker="v", color=ALARM,
                      linestyle="none", markersize=7, clip_on=False)  # fmt: skip
        axes.set_xlim(0, max([*ends, *remasks, window]) * 1.03)
        axes.set_xlabel("scored or generated token")
        axes.set_ylabel("cosine")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
        _vertical(axes, False)
        return _svg(figure, prefix)


def key(style: int | None, kind: str = "line", prefix: str = "k") -> str:
    """What a legend shows: `line`, `dense`, `anchor` (dense as a point), `chance`, `threshold` or `remask`."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(0.5, 0.2))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        if kind == "line" and style is not None:
            axes.plot([0.03, 0.5, 0.97], [0.5] * 3, **_look(style), markevery=[1])
        elif kind == "dense":
            axes.axhspan(0.2, 0.8, color=INK, alpha=0.1, linewidth=0)
            axes.plot([0, 1], [0.5, 0.5], color=INK, linewidth=1.2)
        elif kind == "anchor":
            axes.plot([0, 1], [0.5, 0.5], color=INK, linewidth=1, alpha=0.55)
            axes.plot([0.5], [0.5], color=INK, marker="o", markersize=5.5)
        elif kind == "remask":
            axes.plot([0.5, 0.5], [0, 0.8], color=ALARM, linewidth=1.3, linestyle=(0, (2, 2)))
            axes.plot([0.5], [0.72], color=ALARM, marker="v", markersize=7)
        else:
            dashes = (0, (6, 3)) if kind == "threshold" else (0, (1, 2))
            axes.plot([0, 1], [0.5, 0.5], color=INK, linewidth=1.2, alpha=0.7, linestyle=dashes)
        return _svg(figure, prefix)


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(axis="y")
    axes.tick_params(length=3)
    return figure, axes


def _look(style: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series; no two of the first 40 are alike."""
    return {
        "color": series_colour(style),
        "marker": MARKERS[style % len(MARKERS)],
        "linestyle": DASHES[(style + style // SERIES) % len(DASHES)],
    }


def _line(axes: Axes, line: Line, shift: float, log: bool) -> None:
    points = [p for p in line.points if not log or p.y > 0]
    if not points:
        return
    xs, ys = [p.x + shift for p in points], [p.y for p in points]
    axes.plot(xs, ys, **_look(line.style), clip_on=False)
    for x, p in zip(xs, points, strict=True):
        if p.half is not None:
            below = min(p.half, p.y * 0.999) if log else p.half
            axes.errorbar([x], [p.y], yerr=[[below], [p.half]], color=series_colour(line.style), linewidth=1.3,
                          capsize=2.5, linestyle="none")  # fmt: skip


def _levels(axes: Axes, levels: Sequence[Level]) -> None:
    for level in levels:
        if level.kind == "chance":
            axes.axhline(level.value, color=INK, linewidth=1.1, alpha=0.7, linestyle=(0, (1, 2)))
            continue
        if level.half:
            axes.axhspan(level.value - level.half, level.value + level.half, color=INK, alpha=0.1, linewidth=0)
        axes.axhline(level.value, color=INK, linewidth=1.2)


def _vertical(axes: Axes, log: bool, keep_format: bool = False) -> None:
    digits = 0
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        ticks = axes.get_yticks()
        digits = next((d for d in range(6) if all(abs(t - round(t, d)) < 1e-9 for t in ticks)), 6)
    if not keep_format:
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda y, _: (f"{y:,g}" if log else f"{y:,.{digits}f}").replace("-", "\u2212"))
        )


def _thinned(xs: Sequence[float], apart: float) -> list[float]:
    """Those of the sorted positions that leave room for their labels, ends first."""
    kept: list[float] = []
    for x in [*sorted(xs)[-1:], *sorted(xs)]:
        if all(abs(x - k) >= apart for k in kept):
            kept.append(x)
    return sorted(kept)


def _svg(figure: Figure, prefix: str) -> str:
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return embed(out.getvalue(), prefix)
