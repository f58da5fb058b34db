"""`dart-eval trace`: one prompt under a method, in a few lines, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.bench import Sparsity
from dart_eval.cli.options import own, takes
from dart_eval.cli.run import hush
from dart_eval.cli.tables import PICTURES
from dart_eval.cli.view import print_note, say
from dart_eval.pruning.registry import make, parse
from dart_eval.sweep.options import OUTPUT, PRUNING, config_of
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, read_text, write
from dart_eval.util.quiet import silence
from dart_eval.util.text import Json, json_text

PROMPT = "Prompt"  # a panel of the help
TEXT_HELP = "Prompt; without it, a shipped two-topic document."
METHOD_HELP = "Run this method: a name, or a name with options, such as dart:remask=never."


@takes("model", "dtype", "device", "trust_remote_code")
def trace(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help=TEXT_HELP)] = None,
    file: Annotated[Path | None, own("Read the prompt from this file.", PROMPT, "FILE")] = None,
    method: Annotated[str, own(METHOD_HELP, PRUNING, "NAME")] = "dart",
    sparsity: Sparsity = 0.5,
    tokens: Annotated[int, own("Stop this many tokens after the prompt.", PROMPT, "N", min=1)] = 200,
    output: Annotated[Path | None, own("Write the trace to this JSON file.", OUTPUT, "FILE")] = None,
    plot: Annotated[Path | None, own("Draw the trace into this file: png, svg or pdf.", OUTPUT, "FILE")] = None,
    **given: object,
) -> None:
    """Trace a method on one prompt: the drift signal, alarms, re-masks, and the neurons kept in each layer.

    \b
    [bold]Examples[/bold]
    dart-eval trace "The history of the bicycle is" --tokens 50 --plot trace.png
    dart-eval trace --file prompt.txt --sparsity 0.7 --output trace.json
    """
    hush(False)
    chosen, pruner = config_of({"sparsity": sparsity, **given}), make(*parse(method))
    if text is not None and file is not None:
        raise UserError("both a prompt and --file are given", "leave one of them out")
    if plot is not None and plot.suffix not in PICTURES:
        raise UserError(f"picture {plot} has an unknown ending", f"use one of {', '.join(PICTURES)}")
    for path in filter(None, (output, plot)):
        check_target(path)
    prompt = text if file is None else read_text(file, "text", "give a text file")
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench import tracing
    from dart_eval.models.loading import resolve

    context, then = tracing.smoke_passage() if prompt is None else (prompt, None)
    model, tokenizer = resolve(chosen).load(print_note)
    print_note("tracing")
    found = tracing.trace(model, tokenizer, pruner, sparsity, context, then, tokens)
    say(tracing.summary(found), err=output is not None)
    if output is not None:
        write(output, json_text(found, allow_nan=False) + "\n")
    if plot is not None:
        draw(found, plot)


def draw(trace: Json, path: Path) -> None:
    """Draw the detector's signal over tokens, and how much every mask changed; the ending of `path` is the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set(title=f"{trace['method']}, read {trace['weights_read']:.0%}", ylabel="cosine to the reference")
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
