"""`dart-eval trace`: one prompt under a method, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path

from dart_eval.cli import options
from dart_eval.cli.run import quieten
from dart_eval.cli.view import print_note, say
from dart_eval.errors import UserError
from dart_eval.files import check_target, is_stream, read_text, write
from dart_eval.text import json_text


def trace(
    text: options.TraceText = None,
    file: options.TraceFile = None,
    then: options.TraceThen = None,
    smoke: options.TraceSmoke = 0,
    method: options.TraceMethod = "dart",
    sparsity: options.OneSparsity = 0.5,
    tokens: options.TraceTokens = 200,
    model: options.Model = None,
    dtype: options.OneDtype = "auto",
    device: options.OneDevice = "auto",
    trust_remote_code: options.TrustRemoteCode = None,
    output: options.TraceOutput = Path("trace.json"),
    plot: options.TracePlot = None,
    save_allocation: options.TraceSaveAllocation = None,
) -> None:
    """Show what a method does with one prompt: the drift signal, alarms, new masks, neurons kept in each layer.

    [bold]Examples[/bold]

      dart-eval trace --method dart-plus

      dart-eval trace "The history of the bicycle is" --tokens 50 --output bicycle.json

      dart-eval trace --file prompt.txt --sparsity 0.7 --save-allocation layers.json
    """
    quieten(False)
    check_target(output)
    picture = plot or (None if is_stream(output) else output.with_suffix(".png"))
    from dart_eval.results.trace_plot import FORMATS, draw

    if picture is not None and picture.suffix not in FORMATS:
        raise UserError(f"picture {picture} has no known ending", f"one of {', '.join(FORMATS)}")
    if tokens < 1:
        raise UserError(f"--tokens {tokens} must be at least 1")
    if text is not None and file is not None:
        raise UserError("a prompt and --file are given", "leave one of them out")
    files = [p for p in (output, picture, save_allocation) if p is not None]
    for path in files:
        check_target(path)
    if len({p.absolute() for p in files}) < len(files):
        raise UserError("two outputs have one name", "give --output, --plot and --save-allocation a file each")
    from dart_eval import tracing
    from dart_eval.allocation import write_table
    from dart_eval.models import ModelSpec, resolve
    from dart_eval.pruning.prune import check_sparsity
    from dart_eval.pruning.registry import make, parse

    check_sparsity(sparsity)
    made = make(*parse(method))
    if save_allocation is not None and made.choice.chooses:
        raise UserError(
            f"{made.name} keeps masks wider than the weights it reads: no table can be made from them",
            "save the allocation of a method with choice=none",
        )
    following = read_text(then, "text", "give a text file") if then is not None else None
    if file is not None:
        text = read_text(file, "text", "give a text file")
    if text is None and following is not None:
        raise UserError("--then needs a prompt before it", "give a prompt or --file")
    passage = tracing.smoke_passage(smoke) if text is None else tracing.Passage(text, following)
    spec = ModelSpec(model, None, dtype, device, trust_remote_code=bool(trust_remote_code))
    loaded, tokenizer = resolve(spec).load(print_note)
    found = tracing.trace(loaded, tokenizer, made, sparsity, passage, tokens)
    aside = is_stream(output)  # the JSON may be what a program reads from this one
    say(tracing.summary(found), err=aside)
    write(output, json_text(found, allow_nan=False) + "\n")
    layers = found["layers"]
    if picture is not None:
        draw(found, picture)
        say(f"wrote {output} and {picture}", err=aside)
    if save_allocation is not None:
        ratios = [k / n for k, n in zip(layers["kept"], layers["sizes"], strict=True)]
        write_table(save_allocation, ratios, method=method, sparsity=sparsity, model=model or "gemma-3-270m")
        say(f"wrote {save_allocation}: --allocation table:{save_allocation}", err=aside)
