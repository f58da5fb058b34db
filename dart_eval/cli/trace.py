"""`dart-eval trace`: one prompt under a method, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path

from dart_eval.cli import options
from dart_eval.cli.run import hush
from dart_eval.cli.tables import PICTURES
from dart_eval.cli.view import print_note, say
from dart_eval.pruning.masks.allocations import write_table
from dart_eval.pruning.registry import make, parse
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_target, is_stream, read_text, write
from dart_eval.util.quiet import silence
from dart_eval.util.text import json_text


@options.takes("model", "dtype", "device", "trust_remote_code")
def trace(
    text: options.TraceText = None,
    file: options.TraceFile = None,
    then: options.TraceThen = None,
    smoke: options.TraceSmoke = None,
    method: options.TraceMethod = "dart",
    sparsity: options.OneSparsity = 0.5,
    tokens: options.TraceTokens = 200,
    output: options.TraceOutput = Path("trace.json"),
    plot: options.TracePlot = None,
    save_allocation: options.TraceSaveAllocation = None,
    **given: object,
) -> None:
    """Trace a method on one prompt: the drift signal, alarms, re-masks, and the neurons kept in each layer.

    \b
    [bold]Examples[/bold]
    dart-eval trace --method dart-code
    dart-eval trace "The history of the bicycle is" --tokens 50
    dart-eval trace --file prompt.txt --sparsity 0.7 --save-allocation layers.json
    """
    hush(False)
    chosen = options.chosen(sparsity=sparsity, **given)
    made = make(*parse(method))
    if save_allocation is not None and made.choice.chooses:
        raise UserError(
            f"{made.name} makes no masks: they give no table",
            "save the allocation of a method with masks, such as dart",
        )
    aside = is_stream(output)  # a program may read the JSON from this stream
    picture = _picture(output, plot, save_allocation)
    prompt, following = _prompt(text, file, then, smoke)
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench import tracing
    from dart_eval.models.loading import resolve

    passage = tracing.smoke_passage(smoke or 0) if prompt is None else tracing.Passage(prompt, following)
    loaded, tokenizer = resolve(chosen.model_spec).load(print_note)
    found = tracing.trace(loaded, tokenizer, made, sparsity, passage, tokens)
    say(tracing.summary(found), err=aside)
    write(output, json_text(found, allow_nan=False) + "\n")
    if picture is not None:
        from dart_eval.results.trace_plot import draw

        draw(found, picture)
        say(f"wrote {output} and {picture}", err=aside)
    if save_allocation is not None:
        kept, sizes = found["layers"]["kept"], found["layers"]["sizes"]
        ratios, model = [k / n for k, n in zip(kept, sizes, strict=True)], chosen.model or "gemma-3-270m"
        write_table(save_allocation, ratios, sizes=sizes, method=method, sparsity=sparsity, model=model)
        say(f"wrote {save_allocation}: allocation=table:{save_allocation}", err=aside)


def _picture(output: Path, plot: Path | None, allocation: Path | None) -> Path | None:
    """Return the file of the picture: as given, else beside the JSON; None beside a stream.

    Raises:
        UserError: it has no known ending, a file cannot be written, or two of them are one.
    """
    check_target(output)
    picture = plot or (None if is_stream(output) else output.with_suffix(".png"))
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"picture {picture} has an unknown ending", f"use one of {', '.join(PICTURES)}")
    files = [path for path in (output, picture, allocation) if path is not None]
    for path in files:
        check_target(path)
    if len({p.absolute() for p in files}) < len(files):
        raise UserError("two outputs have the same name", "give --output, --plot and --save-allocation different files")
    return picture


def _prompt(text: str | None, file: Path | None, then: Path | None, smoke: int | None) -> tuple[str | None, str | None]:
    """Return the prompt and the text after it; None for what was not given."""
    given = [name for name, what in (("a prompt", text), ("--file", file), ("--smoke", smoke)) if what is not None]
    if len(given) > 1:
        raise UserError(f"both {given[0]} and {given[1]} are given", "leave one of them out")
    following = read_text(then, "text", "give a text file") if then is not None else None
    prompt = read_text(file, "text", "give a text file") if file is not None else text
    if prompt is None and following is not None:
        raise UserError("--then needs a prompt before it", "add a prompt or --file")
    return prompt, following
