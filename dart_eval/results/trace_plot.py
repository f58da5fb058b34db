"""The picture of a trace (`tracing.trace`): the detector's signal over tokens, and how much every mask changed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dart_eval.util.text import Json


def draw(trace: Json, path: Path) -> None:
    """Write the picture of a trace; its format follows from the ending of `path`."""
    figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set(title=f"{trace['method']} at {trace['sparsity']:.0%} sparsity", ylabel="cosine to the reference")
    if (detector := trace["detector"]) is not None:
        ends = [(i + 1) * detector["window"] for i in range(len(detector["signal"]))]
        upper.plot(ends, detector["signal"], marker="o", label=f"windows of {detector['window']} tokens")
        if detector["threshold"] is not None:
            upper.axhline(detector["threshold"], color="C3", linestyle="--", label="threshold")
        upper.vlines(detector["alarms"], *upper.get_ylim(), colors="C3", alpha=0.3, label="alarms")
        upper.legend()
    layers, remasks = len(trace["layers"]["kept"]), trace["remasks"]
    lower.set(xlim=(0, len(trace["tokens"])), ylim=(layers - 0.5, -0.5), ylabel="layer", xlabel="token")
    if remasks:  # each is a column until the next; its colour is the share of a layer's mask that changed
        edges = [r["token"] for r in remasks] + [max(len(trace["tokens"]), remasks[-1]["token"] + 1)]
        changed = [[1 - r["overlap"][layer] for r in remasks] for layer in range(layers)]
        mesh = lower.pcolormesh(edges, [i - 0.5 for i in range(layers + 1)], changed, cmap="magma_r", vmin=0)
        figure.colorbar(mesh, ax=lower, location="bottom", label="share of the mask that changed")
    figure.savefig(path)
