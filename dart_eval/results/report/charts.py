"""Charts by matplotlib: quality against the FFN bytes read, for the page and for `tables --save`."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dart_eval.results import metrics
from dart_eval.results.board import CONTROL, GUESSING, ROUNDING, WIDTH_OF_LEVEL, Board
from dart_eval.results.inputs import NOISE
from dart_eval.results.metrics import multiple, percent
from dart_eval.util.errors import UserError
from dart_eval.util.text import printable

Curves = Mapping[str, Sequence[Sequence[float]]]  # label -> read, value, and ends of the interval, of each point
WIDTH, HEIGHT, LINE = 350, 240, 13.0  # points; LINE is the height of a name
MARKERS = "os^Dv<>PX"
LIMITS = {False: (-50.0, 150.0), True: (0.5, 5.0)}  # a model further off is broken, and its number means nothing


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
    """Return a chart: a line a label, from the highest read to the lowest; names stand in the order of their ends.

    Args:
        title: above it.
        lines: label -> points, from the highest read to the lowest.
        looks: labels in the order of colours and markers.
        times: whether values are multiples of dense's, on a logarithmic axis, and not per cent of it.
        form: `svg`, `png` or `pdf`.
    """
    least, most = LIMITS[times]  # a point beyond is drawn there, and its name says its value
    reads = [read for of_label in lines.values() for read, *_ in of_label]
    aside = (max(reads) - min(reads) or 0.1) / 16 / len(lines)
    height, picture = HEIGHT + max(0.0, LINE * (len(lines) - 13)), io.BytesIO()
    settings = {"text.parse_math": False, "svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # letters that its own font lacks; a browser has them
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.set(yscale="log" if times else "linear", xlabel="FFN bytes read")
        axes.set_title(printable(title), fontsize=9, loc="left", pad=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3, linewidth=0.5)
        places = [dense := 1.0 if times else 100.0]
        handles = [axes.axhline(dense, color="black", linewidth=0.8, label="dense")]
        for i, (label, of_label) in enumerate(lines.items()):
            # Points of one read stand side by side, so that they and their intervals do not hide each other.
            xs = [read + ((len(lines) - 1) / 2 - i) * aside for read, *_ in of_label]
            ys, lows, highs = ([min(max(p[k], least), most) for p in of_label] for k in (1, 2, 3))
            look, last = looks.index(label), of_label[-1][1]
            name = label.partition(" (")[0]  # without the settings of all rows
            name = name if len(name) < 25 else f"{name[:8]}…{name[-15:]}"
            name += "" if last == ys[-1] else f": {multiple(last) if times else percent(last / 100)}"
            style = f"{MARKERS[look % len(MARKERS)]}{'--' if label.startswith('dense') else '-'}"
            axes.vlines(xs, lows, highs, f"C{look % 10}", alpha=0.4)
            handles += axes.plot(xs, ys, style, color=f"C{look % 10}", ms=4, linewidth=1.2, label=printable(name))
            places.append(last)
        few = times and axes.get_ylim()[1] > 2
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5]) if few else MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}{'x' if times else ' %'}"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
        axes.xaxis.set_inverted(True)
        handles = [handle for _, handle in sorted(zip(places, handles, strict=True), key=lambda pair: -pair[0])]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1.03), frameon=False, labelspacing=0.2)
        about = {"svg": {"Creator": "dart-eval", "Date": None}, "pdf": {"Creator": "dart-eval", "CreationDate": None}}
        figure.savefig(picture, format=form, dpi=180, metadata=about.get(form, {"Software": "dart-eval"}))
    return picture.getvalue()
