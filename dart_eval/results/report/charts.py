"""Charts of the page: plain matplotlib, as SVG that stands inside HTML and follows its light or dark scheme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from cycler import cycler
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dart_eval.results.frontier import MARKERS, look

SIZE = 4.7, 3.0  # inches of 72 units: about the pixels that a chart gets on the page
COLOURS = ("#3a82c8", "#d2691e", "#2a9a72", "#b9559c", "#a07d18", "#3d9db5", "#a5714a", "#7b7fd8")  # on light and dark
ALARM = "#d64541"
SIGNS = dict(zip(MARKERS, "●■▲◆▼◀▶✚★✖", strict=True))
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "path.simplify": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#8888884d", "axes.formatter.useoffset": False,
    "axes.prop_cycle": cycler(color=COLOURS), "figure.constrained_layout.use": True, "figure.figsize": SIZE,
}  # fmt: skip
Draw = Callable[[Any], None]  # into the axes that it is given


@dataclass(frozen=True)
class Chart:
    """A chart with its head, a note under that, and what it shows in words."""

    title: str
    note: str
    words: str
    draw: Draw

    def svg(self, number: int) -> Markup:
        """The picture. Equal charts of one number are equal text; the number keeps the ids of each chart its own."""
        out = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Type": None, "Format": None}
        with mpl.rc_context({**SETTINGS, "svg.hashsalt": f"dart-eval {number}"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks: the browser has it
            figure = Figure()
            FigureCanvasSVG(figure)
            self.draw(figure.add_subplot())
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        text = re.sub(r"(?s)<style.*?</style>", "", out.getvalue())
        text = re.sub(r'(?s).*?<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
        text = re.sub(r' id="(?!C\d)[\w.]+_\d{1,4}"', "", text)  # of no use to anyone, and the same in every chart
        return Markup(text.replace("#000000", "currentColor"))


def key(number: int) -> tuple[str, str]:
    """The sign and the colour of a method in a legend."""
    return SIGNS[MARKERS[number % len(MARKERS)]], COLOURS[number % len(COLOURS)]


@dataclass(frozen=True)
class Point:
    """A value against a sparsity, and half the width of its interval."""

    x: float
    y: float
    half: float = 0.0


def against_sparsity(
    axes: Any, lines: Mapping[int, Sequence[Point]], levels: Sequence[Point], chance: float | None, log: bool
) -> None:
    """Draw values against sparsity.

    Args:
        lines: number of a look -> its points. levels: those that dense stands at. chance: the value under guessing.
        log: the vertical axis is logarithmic.
    """
    xs = sorted({p.x for points in lines.values() for p in points})
    reach = max(xs[-1] - xs[0], 0.1)
    step = min(0.012, 0.06 / len(lines)) * reach  # aside, so that intervals do not hide each other
    for level in levels:
        axes.axhspan(level.y - level.half, level.y + level.half, color="#000000", alpha=0.1, linewidth=0)
        axes.axhline(level.y, color="#000000", linewidth=1.1)
    if chance is not None:
        axes.axhline(chance, color="#000000", linewidth=1.1, linestyle=(0, (1, 2)))
    for i, (number, points) in enumerate(lines.items()):
        below = [min(p.half, 0.999 * p.y) if log else p.half for p in points]
        axes.errorbar(
            [p.x + (i - (len(lines) - 1) / 2) * step for p in points], [p.y for p in points],
            yerr=[below, [p.half for p in points]], **look(number), linewidth=1.5, elinewidth=1, capsize=2.5,
        )  # fmt: skip
    axes.set_xlim(min(xs[0], xs[-1] - reach / 2) - 0.12 * reach, max(xs[-1], xs[0] + reach / 2) + 0.12 * reach)
    axes.set_xlabel("sparsity")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g} %"))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(p.y for points in [*lines.values(), levels] for p in points) >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # not below zero for the sake of an interval


def trace(
    axes: Any, signal: Sequence[float], window: int, threshold: float | None, alarms: Sequence[float],
    remasks: Sequence[float], number: int,
) -> None:  # fmt: skip
    """Draw the detector's signal over the tokens of a document, with its threshold, alarms and re-masks."""
    for x in alarms:
        axes.axvline(x, color=ALARM, alpha=0.25, linewidth=6)
    for x in remasks:
        axes.axvline(x, color=ALARM, linewidth=1.3, linestyle=(0, (2, 2)))
    if threshold is not None:
        axes.axhline(threshold, color="#000000", linewidth=1, linestyle=(0, (6, 3)))
    axes.plot([(i + 1) * window for i in range(len(signal))], signal, **look(number), linewidth=1.5)
    axes.set_xlim(0, max([window * len(signal), *alarms, *remasks]) * 1.03)
    axes.set_xlabel("scored or generated token")
    axes.set_ylabel("cosine")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
