"""Charts: plain matplotlib, as files, and as SVG inside a page that follows its light or dark scheme."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from cycler import cycler
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dart_eval.results import metrics
from dart_eval.results.blocks import WIDTH_OF_LEVEL, Block, Board
from dart_eval.results.format import percent
from dart_eval.results.frontier import by_times, curves

SIZE = 4.7, 3.0  # inches of 72 units: about the pixels that a chart gets on the page
LINE = 0.07  # height of a line of text / height of the axes
LONGEST = 20  # characters of a name beside a line
MOST_TICKS = 6
MOST_TIMES = 50.0  # dense's perplexity: a model further off is broken, and its number means nothing
COLOURS = ("#3a82c8", "#d2691e", "#2a9a72", "#b9559c", "#a07d18", "#3d9db5", "#a5714a", "#7b7fd8")  # on light and dark
ALARM = "#d64541"
SIGNS = dict(zip("os^Dv<>P*X", "●■▲◆▼◀▶✚★✖", strict=True))  # markers, and how a legend writes them
MARKERS = tuple(SIGNS)
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "path.simplify": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#8888884d", "axes.formatter.useoffset": False,
    "axes.prop_cycle": cycler(color=COLOURS), "figure.constrained_layout.use": True, "figure.figsize": SIZE,
}  # fmt: skip
Draw = Callable[[Any], None]  # draws into the axes


@dataclass(frozen=True)
class Chart:
    """A chart with its head, a note below it, and a description in words."""

    title: str
    note: str
    words: str
    draw: Draw

    def svg(self, number: int) -> Markup:
        """Return the picture as SVG, the same text for the same chart; `number` makes the ids of each chart unique."""
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
        text = re.sub(r' id="(?!C\d)[\w.]+_\d{1,4}"', "", text)  # unused ids, the same in every chart
        return Markup(text.replace("#000000", "currentColor"))


def key(number: int) -> tuple[str, str]:
    """The marker and the colour of a method in a legend."""
    return SIGNS[MARKERS[number % len(MARKERS)]], COLOURS[number % len(COLOURS)]


class Point(NamedTuple):
    """A value at a share of weights read, and the ends of its interval."""

    read: float
    value: float
    low: float
    high: float


def look(number: int) -> dict[str, Any]:
    """Return colour and marker of a method in a chart."""
    return {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def points(block: Block) -> dict[str, list[Point]]:
    """Return each method's quality relative to dense's at its weights read, with 95 % intervals: per cent, or times."""
    found: dict[str, list[Point]] = {}
    first = next(iter(block.tasks), "")
    for label, rows in curves(block).items():
        for row in rows:
            quality = row.quality[first]
            if quality.share is not None:
                value = quality.share.value
                ends = (value, *(quality.share.interval or (value, value)))
                found.setdefault(label, []).append(Point(row.read, *(100 * x for x in ends)))
            elif quality.times is not None:
                value, interval = quality.times
                found.setdefault(label, []).append(Point(row.read, value, *(interval or (value, value))))
    return found


def draw(
    axes: Any, lines: Mapping[str, Sequence[Point]], looks: Mapping[str, int], dense: Sequence[Point],
    chance: float | None = None, log: bool = False, cap: tuple[float, float] = (-math.inf, math.inf),
) -> None:  # fmt: skip
    """Draw quality against weights read: a line a method with its name at the end, side by side at every level.

    A value beyond the cap is drawn at it, and its line's name says the value.

    Args:
        lines: label -> points, from the highest read to the lowest.
        looks: label -> the number of its look.
        dense: the rows that read everything, drawn as lines with a band.
        chance: the value under guessing.
        log: whether the vertical axis is logarithmic.
        cap: the lowest and the highest value drawn.
    """
    levels = _levels(p.read for points in lines.values() for p in points)
    reach = levels[-1] - levels[0] or 0.2
    gap = max(min((b - a for a, b in itertools.pairwise(levels)), default=reach), reach / 8)
    step = 0.5 * gap / len(lines)  # aside, so that points and intervals do not hide each other
    for level in dense:
        axes.axhspan(level.low, level.high, color="#000000", alpha=0.08, linewidth=0)
        axes.axhline(level.value, color="#000000", linewidth=1)
    if chance is not None:
        axes.axhline(chance, color="#000000", linewidth=1, linestyle=(0, (1, 2)))
    ends = []
    for i, (label, points) in enumerate(lines.items()):
        xs = [p.read + ((len(lines) - 1) / 2 - i) * step for p in points]
        shown = [Point(p.read, *(min(max(x, cap[0]), cap[1]) for x in p[1:])) for p in points]
        lows = [max(p.low, 0.001 * p.value) if log else p.low for p in shown]
        spans = [[p.value - low for p, low in zip(shown, lows, strict=True)], [p.high - p.value for p in shown]]
        drawn = axes.errorbar(xs, [p.value for p in shown], yerr=spans, **look(looks[label]), linewidth=1.4)
        for bar in drawn.lines[2]:
            bar.set(alpha=0.4, linewidth=1.2)
        end = "" if points[-1].read < levels[0] + 0.5 * gap else f" at {percent(points[-1].read)}"
        end += f": {points[-1].value:,.3g}" if shown[-1].value != points[-1].value else ""
        ends.append((_short(label) + end, xs[-1], shown[-1].value, drawn.lines[0].get_color()))
    axes.set_xlim(levels[-1] + 0.4 * gap, levels[0] - 0.4 * gap)
    ticks = _apart(levels, (levels[-1] - levels[0]) / MOST_TICKS)
    axes.set_xticks(ticks, [percent(x) for x in ticks])
    axes.set_xlabel("FFN bytes read")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif cap[0] == -math.inf and min(p.value for points in [*lines.values(), dense] for p in points) >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # an interval alone does not take the axis below zero
    _name(axes, ends)


def _apart(levels: Sequence[float], gap: float) -> list[float]:
    """Return levels at least a gap apart, so that their ticks do not overlap."""
    found: list[float] = []
    for level in levels:
        if not found or level - found[-1] >= gap:
            found.append(level)
    return found


def _levels(reads: Iterable[float]) -> list[float]:
    """Return the levels of weights read, from the lowest; values closer than a board's level are one."""
    levels: list[list[float]] = []
    for read in sorted(reads):
        if not levels or read - levels[-1][-1] > WIDTH_OF_LEVEL:
            levels.append([])
        levels[-1].append(read)
    return [statistics.mode(level) for level in levels]


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}\u2026"


def _name(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write the names of lines beside the axes, as near to the lines' ends as they fit without overlap."""
    line = min(LINE, 1 / len(ends))
    axes.figure.set_figheight(axes.figure.get_figheight() * LINE / line)
    to_axes = axes.transData + axes.transAxes.inverted()
    found = sorted((to_axes.transform((x, y))[1], x, y, name, colour) for name, x, y, colour in ends)
    up = list(itertools.accumulate((f[0] for f in found), lambda below, own: max(own, below + line)))
    down = list(itertools.accumulate((f[0] for f in reversed(found)), lambda above, own: min(own, above - line)))[::-1]
    middle = [(high + low) / 2 for high, low in zip(up, down, strict=True)]
    inside = max(0.0, middle[-1] - 1) + min(0.0, middle[0])
    heights = [height - inside for height in middle]
    for height, (_, x, y, name, colour) in zip(heights, found, strict=True):
        thread = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8, "linestyle": ":"}
        axes.annotate(name, (x, y), (1.03, height), textcoords="axes fraction", va="center", fontsize=9.5,
                      color=colour, arrowprops=thread, annotation_clip=False)  # fmt: skip


def picture(board: Board, form: str) -> bytes:
    """Return the quality of a board's first block that has any, as a file of its own.

    Args:
        form: `png`, `svg` or `pdf`.
    """
    kept = io.BytesIO()
    with mpl.rc_context({**SETTINGS, "svg.fonttype": "path", "svg.hashsalt": "dart-eval"}):
        figure = Figure(figsize=(7.0, 4.2))
        axes = figure.add_subplot()
        block = next(b for b in board.blocks if curves(b))
        found = points(block)
        quality(axes, block, {label: i for i, label in enumerate(found)})
        axes.set(ylabel=of_quality(block), title=board.model)
        metadata = {"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else {}
        figure.savefig(kept, format=form, dpi=150, metadata=metadata)
    return kept.getvalue()


def quality(axes: Any, block: Block, looks: Mapping[str, int]) -> None:
    """Draw the quality of a block relative to dense's; points beyond the cap are named."""
    if by_times(block):
        draw(axes, points(block), looks, [Point(1, 1, 1, 1)], None, True, (0.5, MOST_TIMES))
    else:
        draw(axes, points(block), looks, [Point(1, 100, 100, 100)], 0.0, False, (-50.0, 150.0))


def of_quality(block: Block) -> str:
    """Return the title of the vertical axis of `quality`."""
    if by_times(block):
        return "perplexity, x dense (lower is better)"
    chance = metrics.kind_of(next(iter(block.tasks))).chance
    return "% of dense above guessing" if chance else "% of dense"


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
