"""Charts by matplotlib: quality against the FFN bytes read, for the page and for `tables --save`."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from dart_eval.results import metrics
from dart_eval.results.board import CONTROL, GUESSING, ROUNDING, WIDTH_OF_LEVEL, Board
from dart_eval.results.inputs import NOISE
from dart_eval.results.metrics import multiple, percent
from dart_eval.util.errors import UserError
from dart_eval.util.text import printable

Curves = Mapping[str, Sequence[Sequence[float]]]  # label -> read, value, and ends of the interval, of each point
WIDTH, HEIGHT, LINE = 432, 288, 11.0  # points; LINE is the height of a name
MARKERS = "os^Dv<>PX"
WORST = 2.0  # x dense: a model further off is broken, and how far means nothing
NEAR, NAMED = 0.045, 4  # reads that are nearer to each other share a tick or an arrow; names at an arrow
PLACES = [  # of a name beside its point: points to the right and up, and how it is aligned
    (dx * far, dy * far, ("right", "center", "left")[dx + 1], ("top", "center", "bottom")[dy + 1])
    for far in (5, 10, 20) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
]  # fmt: skip


def curves(board: Board, perplexity: bool) -> tuple[str, Curves]:
    """Return the name of a metric, and the curves of the block that has most points of it beside dense's.

    There is nothing to draw where all points are of one read. Rounding to several numbers of bits is one curve.

    Args:
        board: of one model.
        perplexity: whether to return perplexities, as multiples of dense's; else what is left of dense's quality
            above guessing, in per cent.
    """
    candidates: list[tuple[str, Curves]] = [("", {})]
    metrics_of = (
        (block.rows, metric) for block in board.blocks for metric in block.tasks
        if perplexity == (metrics.kind_of(metric).group == metrics.PERPLEXITY)
    )  # fmt: skip
    for rows, metric in metrics_of:
        points: dict[str, list[tuple[float, ...]]] = {}
        families = [re.sub(r"\d+", "N", row.label, count=1) for row in rows if row.kind == ROUNDING]
        for row in rows:
            quality, family = row.quality.get(metric), re.sub(r"\d+", "N", row.label, count=1)
            ratio = quality and quality.beside_dense(metric)
            if ratio and row.kind not in (CONTROL, NOISE, GUESSING) and math.isfinite(ratio.value):
                values = (ratio.value, *(ratio.interval or (ratio.value, ratio.value)))
                label = family if families.count(family) > 1 else row.label
                points.setdefault(label, []).append((row.read, *(v if perplexity else 100 * v for v in values)))
        reads = [point[0] for of_label in points.values() for point in of_label]
        if reads and max(reads) - min(reads) > WIDTH_OF_LEVEL:
            candidates.append((metric, {label: sorted(points[label], reverse=True) for label in sorted(points)}))
    return max(candidates, key=lambda candidate: sum(map(len, candidate[1].values())))


def charts(board: Board, form: str = "svg") -> list[tuple[str, bytes]]:
    """Return the titles and pictures of at most two charts: quality above guessing, and perplexity."""
    both = [(False, *curves(board, False)), (True, *curves(board, True))]
    labels = [label for *_, lines in both for label, points in lines.items() for _ in points]
    looks = sorted({*labels}, key=lambda label: (-labels.count(label), label))  # the same in both
    pictures = []
    for times, metric, lines in both:
        unit = "% of dense above guessing" if metrics.kind_of(metric).chance else "% of dense"
        title = f"{board.model}: {metrics.title_of(metric)}, {'x dense, lower is better' if times else unit}"
        pictures += [(title, plot(title, lines, looks, times, form))] if lines else []
    return pictures


def draw(boards: Sequence[Board], form: str) -> bytes:
    """Return the first chart of a board as a file of its own. form: `png`, `svg` or `pdf`.

    Raises:
        UserError: there are several models, or nothing that could be drawn.
    """
    if len(boards) > 1:
        raise UserError("there are the results of several models", "give each one an --output of its own to draw it")
    for _, picture in charts(boards[0], form):
        return picture
    raise UserError("there is nothing to draw", "run dense, which must beat guessing, and a method at several reads")


def plot(title: str, lines: Curves, looks: Sequence[str], times: bool, form: str) -> bytes:
    """Return a chart: a line a label, named beside one of its points.

    Args:
        title: above it.
        lines: label -> points, from the highest read to the lowest.
        looks: labels in the order of colours and markers.
        times: whether values are multiples of dense's, on a logarithmic axis up to `WORST`, and not per cent of it. A
            label without a point up to there is an arrow at the edge, with the value at its highest read.
        form: `svg`, `png` or `pdf`.
    """
    shown = {label: [p for p in points if not times or p[1] <= WORST] for label, points in lines.items()}
    beyond: dict[float, list[tuple[float, str]]] = {}  # read -> values and names
    for label, ((read, value, *_), *_) in lines.items():
        if not shown[label]:
            place = next((known for known in beyond if abs(known - read) < NEAR), read)
            beyond.setdefault(place, []).append((value, f"{_brief(label)} {multiple(value)}"))
    above = LINE * min(NAMED + 1, max(map(len, beyond.values()), default=0)) + 8 * bool(beyond)
    height, picture = HEIGHT + above, io.BytesIO()
    settings = {"text.parse_math": False, "svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # letters that its own font lacks; a browser has them
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        figure.text(0.02, 1 - 5 / height, printable(title), va="top")
        axes = figure.add_axes((0.1, 36 / height, 0.7, (HEIGHT - 58) / height))
        reads = sorted({read for points in lines.values() for read, *_ in points}, reverse=True)
        ticks = reads[:1]
        for read in reads:
            ticks += [read] * (ticks[-1] - read >= NEAR)
        axes.set(xlabel="FFN bytes read", xlim=(reads[0] + NEAR, reads[-1] - NEAR / 2))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3, linewidth=0.5)
        axes.axhline(dense := 1.0 if times else 100.0, color="black", linewidth=0.8)
        colors = {label: f"C{looks.index(label) % 10}" for label in lines}
        for label in filter(shown.get, lines):
            marker = MARKERS[looks.index(label) % len(MARKERS)]
            xs, ys, lows, highs = zip(*lines[label], strict=True)
            axes.vlines(xs, lows, highs, colors[label], alpha=0.4)
            dashes = "--" if label.startswith("dense") else "-"
            axes.plot(xs, ys, marker + dashes, color=colors[label], ms=4, linewidth=1.2)
        if times:
            axes.set(yscale="log", ylim=(min([0.98, *(p[2] for points in shown.values() for p in points)]), WORST))
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
        axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2]) if times else MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}{'x' if times else ' %'}"))
        for read, texts in beyond.items():
            names = [name for _, name in sorted(texts)]
            names[NAMED:] = [f"and {len(names) - NAMED} more"] * (len(names) > NAMED)
            arrow = {"arrowstyle": "<|-", "color": "black", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (read, WORST), (0, 14), "data", "offset points", arrow)
            axes.annotate("\n".join(names), (read, WORST), (6, 4), "data", "offset points", fontsize=8)
        taken = [(axes.get_xlim()[0], dense), (axes.get_xlim()[1], dense)]
        _name(axes, {label: [p[:2] for p in lines[label]] for label in filter(shown.get, lines)}, taken, colors)
        about = {"svg": {"Creator": "dart-eval", "Date": None}, "pdf": {"Creator": "dart-eval", "CreationDate": None}}
        figure.savefig(picture, format=form, dpi=180, metadata=about.get(form, {"Software": "dart-eval"}))
    return picture.getvalue()


def _brief(label: str) -> str:
    """Return a label without the settings of all rows, and not too long."""
    name = printable(label.partition(" (")[0])
    return name if len(name) < 25 else f"{name[:8]}…{name[-15:]}"


def _name(
    axes: Axes, lines: Mapping[str, Sequence[Sequence[float]]], taken: Sequence[Sequence[float]],
    colors: Mapping[str, str],
) -> None:  # fmt: skip
    """Write the name of each line beside it, where it crosses no line and no other name; else in the right margin.

    Args:
        lines: label -> points.
        taken: points of a line that has no name.
    """
    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[arg-type]
    pixels = {label: axes.transData.transform(points) for label, points in lines.items()}
    paths = [Path(points) for points in (*pixels.values(), axes.transData.transform(taken))]
    boxes = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for points in pixels.values() for x, y in points]
    inside, margin = axes.bbox, 0.0
    room = Bbox.from_extents(inside.x0 + 2, inside.y0 + 2, axes.figure.bbox.x1, inside.y1)
    for label, points in sorted(lines.items(), key=lambda item: len(item[1])):
        between = (pixels[label][1:] + pixels[label][:-1]) / 2
        beside = [*reversed(points), *axes.transData.inverted().transform(between).tolist()]
        for (x, y), (dx, dy, ha, va) in itertools.product(beside, PLACES):
            text = axes.annotate(
                _brief(label), (x, y), (dx, dy), "data", "offset points", ha=ha, va=va, color=colors[label], fontsize=8
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            fits = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if fits and not box.count_overlaps(boxes) and not any(p.intersects_bbox(box, filled=False) for p in paths):
                boxes.append(box)
                break
            text.remove()
        else:
            margin -= LINE
            axes.annotate(
                _brief(label), (1, 1), (-4, margin), ("figure fraction", "axes fraction"), "offset points", ha="right",
                color=colors[label], fontsize=8,
            )  # fmt: skip
