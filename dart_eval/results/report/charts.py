"""Charts: laid out once, drawn as SVG by the page's template and as files by matplotlib."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dart_eval.results import metrics
from dart_eval.results.blocks import CONTROL, GUESSING, WIDTH_OF_LEVEL, Block, Board, BoardRow
from dart_eval.results.format import multiple, percent

WIDTH, LEFT, RIGHT, TOP, HEIGHT = 340, 40, 222, 8, 170  # about the pixels that a chart gets; HEIGHT is of its axes
LINE = 12.5  # height of a line of text
AXIS = "FFN bytes read"
LONGEST = 20  # characters of a name beside a line
MOST_TICKS = 6
MOST_TIMES = 50.0  # dense's perplexity: a model further off is broken, and its number means nothing
COLOURS = ("#3a82c8", "#d2691e", "#2a9a72", "#b9559c", "#a07d18", "#3d9db5", "#a5714a", "#7b7fd8")  # on light and dark
SIGNS = {  # of methods: matplotlib's name, and the outline around a point
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "s": "M-2.7-2.7h5.4v5.4h-5.4z", "^": "M0-3.6 3.3 2.6h-6.6z",
    "D": "M0-3.9 3.3 0 0 3.9-3.3 0z", "v": "M0 3.6 3.3-2.6h-6.6z", "<": "M-3.6 0 2.6-3.3v6.6z",
    ">": "M3.6 0-2.6-3.3v6.6z", "P": "M-1.2-3.4h2.4v2.2h2.2v2.4h-2.2v2.2h-2.4v-2.2h-2.2v-2.4h2.2z",
    "X": "M-1.9-3.4 0-1.5 1.9-3.4 3.4-1.9 1.5 0 3.4 1.9 1.9 3.4 0 1.5-1.9 3.4-3.4 1.9-1.5 0-3.4-1.9z",
}  # fmt: skip


class Point(NamedTuple):
    """A value at a share of bytes read, the ends of its interval, all in words, and its place."""

    read: float
    value: float
    low: float
    high: float
    text: str = ""
    x: float = math.nan


class Line(NamedTuple):
    """The points of a method in a chart; `name` stands at the end of the line."""

    label: str
    points: Sequence[Point]
    number: int
    name: str


@dataclass(frozen=True)
class Scale:
    """Maps values to places on an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, value = ((math.log10(v) if self.log else v) for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places and the texts of round values."""
        found: list[float] = []
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            powers = [10.0**i for i in range(math.floor(low), math.ceil(high) + 1)]
            found = [k * p for p in powers for k in ((1, 2, 5) if high - low < 2 else (1,))]
            found = [v for v in found if self.low <= v <= self.high]
            found = found[:: math.ceil(len(found) / MOST_TICKS) or 1]
        if len(found) < 2:
            rough = (self.high - self.low) / MOST_TICKS
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
            found = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self(v), f"{round(v, 9):,g}") for v in found]


@dataclass(frozen=True)
class Chart:
    """A chart, in values.

    Attributes:
        title, note: above it.
        lines: with `x` of each point.
        span: values of x at the left and at the right end.
        ticks: values of x, and their texts.
        across: horizontal lines: kind, value, ends of the band.
        log: whether the vertical axis is logarithmic.
        cap: the lowest and the highest value drawn: a point beyond is drawn there.
    """

    title: str
    note: str
    lines: Sequence[Line]
    span: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    across: Sequence[tuple[str, float, float, float]] = ()
    log: bool = False
    cap: tuple[float, float] = (-math.inf, math.inf)

    def laid(self) -> dict[str, Any]:
        """Return all places in the drawing, from its upper left corner."""

        def capped(value: float) -> float:
            return min(max(value, self.cap[0]), self.cap[1])

        points = [p for line in self.lines for p in line.points if math.isfinite(p.value)]
        ends = [capped(v) for p in points for v in p[1:4]] + [v for _, *values in self.across for v in values]
        if self.log:
            ends = [max(v, 0.001 * min(p.value for p in points)) for v in ends]
        low, high = min(ends), max(ends)
        room = max(1.05, (high / low) ** 0.05) if self.log else 0.05 * (high - low) or abs(0.1 * high) or 1.0
        free = self.log or self.cap[0] != -math.inf or min(p.value for p in points) < 0
        bounds = (low / room, high * room) if self.log else (low - room if free else max(0.0, low - room), high + room)
        bottom = TOP + max(HEIGHT, LINE * len(self.lines))
        x, y = Scale(*self.span, LEFT, RIGHT), Scale(*bounds, bottom, TOP, self.log)

        def placed(p: Point) -> Point:
            value, low, high = (y(capped(max(v, bounds[0]))) for v in (p.value, p.low, p.high))
            return Point(p.read, value, low, high, p.text, x(p.x))

        names = _apart_names([(y(capped(line.points[-1].value)), line) for line in self.lines], bottom)
        return {
            "height": bottom + 36, "bottom": bottom, "left": LEFT, "right": RIGHT, "width": WIDTH, "top": TOP,
            "axis": AXIS, "xticks": [(x(v), t) for v, t in self.ticks], "yticks": y.ticks(),
            "across": [(kind, *(y(max(v, bounds[0])) for v in values)) for kind, *values in self.across],
            "lines": [
                {
                    "label": line.label, "name": line.name, "at": names[line.label],
                    "colour": COLOURS[line.number % len(COLOURS)], "sign": sign(line.number),
                    "points": [placed(p) for p in line.points if math.isfinite(p.value)],
                }
                for line in self.lines
            ],
        }  # fmt: skip


def sign(number: int) -> str:
    """Return the outline of a method's points."""
    return [*SIGNS.values()][number % len(SIGNS)]


def _apart_names(ends: Sequence[tuple[float, Line]], bottom: float) -> dict[str, float]:
    """Return the heights of the names of lines, as near to the lines' ends as they fit without overlap."""
    found = sorted((height, line.label) for height, line in ends)
    down = list(itertools.accumulate((h for h, _ in found), lambda above, own: max(own, above + LINE)))
    up = list(itertools.accumulate((h for h, _ in reversed(found)), lambda below, own: min(own, below - LINE)))[::-1]
    first, last = TOP, bottom - LINE * (len(found) - 1)  # of the first name
    return {
        label: round(min(max((a + b) / 2, first + LINE * i), last + LINE * i), 1)
        for i, (a, b, (_, label)) in enumerate(zip(down, up, found, strict=True))
    }


def against_read(
    title: str, note: str, lines: Mapping[str, Sequence[Point]], looks: Mapping[str, int], dense: Sequence[Point],
    chance: float | None = None, log: bool = False, cap: tuple[float, float] = (-math.inf, math.inf),
) -> Chart:  # fmt: skip
    """Return quality against bytes read: a line a method with its name at the end, side by side at every level.

    Args:
        title: of the chart.
        note: beside it.
        lines: label -> points, from the highest read to the lowest.
        looks: label -> the number of its look.
        dense: the rows that read everything, drawn as lines with a band.
        chance: the value under guessing.
        log: whether the vertical axis is logarithmic.
        cap: the lowest and the highest value drawn; the name of a line that ends beyond says the value.
    """
    levels = _levels(p.read for points in lines.values() for p in points)
    reach = levels[-1] - levels[0] or 0.2
    gap = max(min((b - a for a, b in itertools.pairwise(levels)), default=reach), reach / 8)
    # Of one read, points go aside, so that they and their intervals do not hide each other.
    step = 0.5 * gap / len(lines)
    made = []
    for i, (label, points) in enumerate(lines.items()):
        name = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}\u2026"
        name += "" if cap[0] <= points[-1].value <= cap[1] else f": {points[-1].value:,.3g}"
        placed = [p._replace(x=p.read + ((len(lines) - 1) / 2 - i) * step) for p in points]
        made.append(Line(label, placed, looks[label], name))
    ticks: list[float] = []
    least = 0.99 * (levels[-1] - levels[0]) / MOST_TICKS  # so that rounding drops none of evenly spaced levels
    for level in levels:
        ticks += [level] if not ticks or level - ticks[-1] >= least else []
    across = [("dense", *p[1:4]) for p in dense] + ([] if chance is None else [("guessing", chance, chance, chance)])
    return Chart(
        title, note, made, (levels[-1] + 0.4 * gap, levels[0] - 0.4 * gap), [(v, percent(v)) for v in ticks], across,
        log, cap,
    )  # fmt: skip


def _levels(reads: Iterable[float]) -> list[float]:
    """Return the levels of weights read, from the lowest; values closer than a board's level are one."""
    levels: list[list[float]] = []
    for read in sorted(reads):
        if not levels or read - levels[-1][-1] > WIDTH_OF_LEVEL:
            levels.append([])
        levels[-1].append(read)
    return [statistics.mode(level) for level in levels]


def curves(block: Block) -> dict[str, list[BoardRow]]:
    """Return method -> the rows that have a quality beside dense's, from the highest read to the lowest."""
    first, found = next(iter(block.tasks), ""), dict[str, list[BoardRow]]()
    for row in block.rows:
        quality = row.quality.get(first)
        if quality and row.kind not in (CONTROL, GUESSING) and (quality.share or (_by_times(block) and quality.times)):
            found.setdefault(row.label, []).append(row)
    return {label: sorted(rows, key=lambda row: -row.read) for label, rows in sorted(found.items())}


def _by_times(block: Block) -> bool:
    """Whether the block's first metric is a perplexity."""
    return metrics.kind_of(next(iter(block.tasks), "")).group == metrics.PERPLEXITY


def of_block(block: Block, looks: Mapping[str, int], note: str = "") -> Chart | None:
    """Return the quality of a block relative to dense's, with 95 % intervals; None without a method beside dense.

    Args:
        block: with the rows to draw.
        looks: label -> the number of its look.
        note: beside the title.
    """
    first, times = next(iter(block.tasks), ""), _by_times(block)
    lines: dict[str, list[Point]] = {}
    for label, rows in curves(block).items():
        for row in rows:
            quality = row.quality[first]
            found = quality.share or quality.times
            if found is None or not math.isfinite(found.value):
                continue
            value, ends = found
            low, high = ends or (value, value)
            text = (multiple if times else percent)(value, *(ends or ()))
            if not times:
                value, low, high = 100 * value, 100 * low, 100 * high
            lines.setdefault(label, []).append(
                Point(row.read, value, low, high, f"{label} at {percent(row.read)}: {text}")
            )
    if not lines:
        return None
    chance = metrics.kind_of(first).chance
    what = "x dense, lower is better" if times else "% of dense above guessing" if chance else "% of dense"
    title, whole = ("Perplexity", 1.0) if times else ("Quality", 100.0)
    return against_read(
        title, "; ".join(filter(None, (what, note))), lines, looks, [Point(1, whole, whole, whole)], None, times,
        (0.5, MOST_TIMES) if times else (-50.0, 150.0),
    )  # fmt: skip


def picture(board: Board, form: str) -> bytes:
    """Return the quality of a board's first block that has any, as a file of its own.

    Args:
        board: of one model.
        form: `png`, `svg` or `pdf`.
    """
    block = next(b for b in board.blocks if curves(b))
    chart = of_block(block, {label: i for i, label in enumerate(curves(block))})
    assert chart is not None
    return drawn(chart, board.model, form)


def drawn(chart: Chart, subject: str, form: str) -> bytes:
    """Return a chart as a file of its own.

    Args:
        subject: before its title. form: `png`, `svg` or `pdf`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    laid, kept = chart.laid(), io.BytesIO()
    plain: dict[Any, Any] = {"text.parse_math": False, "svg.hashsalt": "dart-eval"}
    with mpl.rc_context(plain):
        figure = Figure(figsize=(WIDTH / 50, (laid["height"] + 14) / 50))
        axes = figure.add_axes((0, 0, 1, laid["height"] / (laid["height"] + 14)), frameon=False)
        axes.set(xlim=(0, WIDTH), ylim=(laid["height"], 0), xticks=[], yticks=[])
        axes.text(LEFT, -2, f"{subject}: {chart.title}, {chart.note}", fontsize=11)
        for y, text in laid["yticks"]:
            axes.plot([LEFT, RIGHT], [y, y], color="#8888884d", linewidth=0.6)
            axes.text(LEFT - 4, y, text, ha="right", va="center")
        for x, text in [*laid["xticks"], ((LEFT + RIGHT) / 2, f"\n{AXIS}")]:
            axes.text(x, laid["bottom"] + 4, text, ha="center", va="top")
        for kind, y, *_ in laid["across"]:
            axes.plot([LEFT, RIGHT], [y, y], color="#000000", linewidth=0.8)
            axes.text(LEFT + 3, y - 1, kind, va="bottom", fontsize=8)
        for line, marker in zip(laid["lines"], itertools.cycle(SIGNS), strict=False):
            xs, ys = [p.x for p in line["points"]], [p.value for p in line["points"]]
            axes.vlines(xs, [p.high for p in line["points"]], [p.low for p in line["points"]], line["colour"],
                        alpha=0.4)  # fmt: skip
            axes.plot(xs, ys, color=line["colour"], marker=marker, markersize=5)
            axes.plot([xs[-1], RIGHT + 6], [ys[-1], line["at"]], ":", color=line["colour"], linewidth=0.6)
            axes.text(RIGHT + 8, line["at"], line["name"], color=line["colour"], va="center")
        metadata = {"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else {}
        figure.savefig(kept, format=form, dpi=180, metadata=metadata)
    return kept.getvalue()
