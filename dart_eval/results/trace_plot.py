"""The picture of a trace (`tracing.trace`): the detector's signal over tokens, and how much every mask changed."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dart_eval.util.files import write
from dart_eval.util.text import Json

SIGNAL, ALARM, LIMIT = "#1f5fa8", "#c0392b", "#555b63"


def draw(trace: Json, path: Path, title: str = "") -> None:
    """Write the picture of a trace; its format follows from the ending of `path`."""
    layers, tokens = trace["layers"], len(trace["tokens"])
    figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.25), width_ratios=(5, 1))
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0])
    side = figure.add_subplot(grid[1, 1], sharey=lower)
    figure.suptitle(title or f"{trace['method']} at {trace['sparsity']:.0%} sparsity", x=0.01, ha="left", fontsize=12)
    _signal(upper, trace, tokens)
    changes = _changes(lower, trace, tokens)
    if changes is not None:
        figure.colorbar(
            changes, ax=lower, location="bottom", shrink=0.5, pad=0.02, label="share of the mask that changed"
        )
    shares = [k / n for k, n in zip(layers["kept"], layers["sizes"], strict=True)]
    side.barh(range(len(shares)), shares, color=SIGNAL, height=0.8)
    side.set(xlim=(0, 1), xlabel="neurons in the mask")
    side.tick_params(labelleft=False)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower, side):
        axes.spines[["top", "right"]].set_visible(False)
    made = io.BytesIO()
    figure.savefig(made, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    write(path, made.getvalue())


def _signal(axes: Axes, trace: Json, tokens: int) -> None:
    detector = trace["detector"]
    axes.set(xlim=(0, max(tokens, 1)), ylabel="cosine to the reference")
    axes.set_xlabel("token after the prompt" + (" (all of them on another topic)" if trace["switch"] else ""))
    if detector is None:
        axes.text(0.5, 0.5, "no detector, or no full window", ha="center", transform=axes.transAxes, color=LIMIT)
        return
    window, signal = detector["window"], detector["signal"]
    ends = [(i + 1) * window for i in range(len(signal))]
    if "mean" in detector:
        axes.axhline(detector["mean"], color=LIMIT, linewidth=1, linestyle=":", label="mean of the prompt's windows")
    if detector["threshold"] is not None:
        axes.axhline(detector["threshold"], color=ALARM, linewidth=1, linestyle="--", label="threshold")
    axes.plot(ends, signal, color=SIGNAL, marker="o", markersize=3.5, label=f"windows of {window} tokens")
    for i, token in enumerate(detector["alarms"]):
        axes.axvline(token, color=ALARM, alpha=0.25, linewidth=6, label="alarm" if i == 0 else None)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)


def _changes(axes: Axes, trace: Json, tokens: int) -> QuadMesh | None:
    """Draw each re-mask as a column until the next; its colour is the share of a layer's mask that changed."""
    remasks, layers = trace["remasks"], len(trace["layers"]["kept"])
    axes.set(xlim=(0, max(tokens, 1)), ylim=(layers - 0.5, -0.5), ylabel="layer", xlabel="token after the prompt")
    if not remasks:
        axes.text(0.5, 0.5, "the mask never changed", ha="center", transform=axes.transAxes, color=LIMIT)
        return None
    ends = [*(r["token"] for r in remasks[1:]), tokens]
    edges, columns = [0.0, remasks[0]["token"]], [[0.0] * layers]
    for remask, end in zip(remasks, ends, strict=True):
        columns.append([1 - o for o in remask["overlap"]])
        edges.append(max(end, edges[-1] + 0.5))
    values = [[column[layer] for column in columns] for layer in range(layers)]
    highest = max(max(c) for c in columns)
    mesh = axes.pcolormesh(
        edges, [i - 0.5 for i in range(layers + 1)], values, cmap="magma_r", vmin=0, vmax=max(highest, 0.05)
    )
    for remask in remasks:
        axes.axvline(remask["token"], color=ALARM, linewidth=1.2)
    return mesh
