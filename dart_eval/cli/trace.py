"""`dart-eval trace`: one prompt under a method, in a few lines, as JSON and as a picture."""

from __future__ import annotations

from dart_eval.cli import options
from dart_eval.cli.run import hush
from dart_eval.cli.tables import PICTURES
from dart_eval.cli.view import print_note, say
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.tables import write_table
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, read_text, write
from dart_eval.util.quiet import silence
from dart_eval.util.text import json_text


@options.takes("model", "dtype", "device", "trust_remote_code")
def trace(
    text: options.TraceText = None,
    file: options.TraceFile = None,
    method: options.TraceMethod = "dart",
    sparsity: options.OneSparsity = 0.5,
    tokens: options.TraceTokens = 200,
    output: options.TraceOutput = None,
    plot: options.TracePlot = None,
    save_allocation: options.TraceSaveAllocation = None,
    **given: object,
) -> None:
    """Trace a method on one prompt: the drift signal, alarms, re-masks, and the neurons kept in each layer.

    \b
    [bold]Examples[/bold]
    dart-eval trace "The history of the bicycle is" --tokens 50 --plot trace.png
    dart-eval trace --file prompt.txt --sparsity 0.7 --save-allocation layers.json
    """
    hush(False)
    chosen, pruner = options.chosen(sparsity=sparsity, **given), make(*parse(method))
    if text is not None and file is not None:
        raise UserError("both a prompt and --file are given", "leave one of them out")
    if plot is not None and plot.suffix not in PICTURES:
        raise UserError(f"picture {plot} has an unknown ending", f"use one of {', '.join(PICTURES)}")
    for path in filter(None, (output, plot, save_allocation)):
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
        from dart_eval.results.trace_plot import draw

        draw(found, plot)
    if save_allocation is not None:
        kept, sizes = found["layers"]["kept"], found["layers"]["sizes"]
        ratios, name = [k / n for k, n in zip(kept, sizes, strict=True)], chosen.model or "gemma-3-270m"
        write_table(save_allocation, ratios, sizes=sizes, method=method, sparsity=sparsity, model=name)
