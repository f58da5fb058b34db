"""`dart-eval bench`: one verb for each thing that can be measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dart_eval.cli.options import FORMATS, one_of, own, takes
from dart_eval.cli.run import hush
from dart_eval.cli.view import output as show
from dart_eval.cli.view import print_note, say
from dart_eval.sweep.options import MODEL, OUTPUT, PRUNING, config_of
from dart_eval.sweep.plan import methods_of
from dart_eval.util.bits import parse
from dart_eval.util.files import check_name, check_target
from dart_eval.util.quiet import silence

DEFAULT = ("griffin", "dart", "dart-code", "grinqh")  # methods
METHODS_HELP = (
    "Measure these methods, comma-separated, spelled as for `dart-eval run`.  "
    rf"\[default: {','.join(DEFAULT)}]"
)
SPARSITY_HELP = "Share of FFN weight bytes that a decoded token does not read."
BITS_HELP = "Also measure dense and methods on FFN weights rounded to these bits: 4:128 or 8:row,3."
SHAPE_HELP = (
    "Use the shape of this model without its weights: llama-3.1-8b, llama-3.2-3b, llama-3.2-1b or qwen2.5-1.5b."
)
LAYERS_HELP = r"Give the shape this many layers.  \[default: its own]"
PROMPT_HELP = "Start with a prompt of this many random tokens."
ROUNDS_HELP = "Measure this many rounds; dense, control and method take turns in each."
OUTPUT_HELP = "Also write the measured speeds to this results folder, one file per method."
Methods = Annotated[list[str] | None, own(METHODS_HELP, PRUNING, "NAMES")]
Sparsity = Annotated[float, own(SPARSITY_HELP, PRUNING, "SHARE")]
Format = Annotated[str, one_of(FORMATS, "format", "Print in this format.", OUTPUT)]
TIMING = "Timing"  # a panel of the help
app = typer.Typer(help="Measure the decode speed of methods, or their state and FLOPs.", no_args_is_help=True)


@app.command("decode")
@takes("model", "dtype", "device", "trust_remote_code")
def decode(
    method: Methods = None,
    sparsity: Sparsity = 0.7,
    ffn_bits: Annotated[list[str] | None, own(BITS_HELP, PRUNING, "BITS")] = None,
    shape: Annotated[str | None, own(SHAPE_HELP, MODEL, "NAME")] = None,
    layers: Annotated[int | None, own(LAYERS_HELP, MODEL, "N")] = None,
    prompt: Annotated[int, own(PROMPT_HELP, TIMING, "N", min=1)] = 128,
    steps: Annotated[int, own("Decode this many tokens per round.", TIMING, "N", min=1)] = 30,
    rounds: Annotated[int, own(ROUNDS_HELP, TIMING, "N", min=1)] = 3,
    output: Annotated[str | None, own(OUTPUT_HELP, OUTPUT, "DIR")] = None,
    format: Format = "table",
    **given: Any,
) -> None:
    """Measure the decode speed of methods on one sequence, relative to dense.

    Dense, dense once more (a control) and the method take turns, token by
    token. Each speed-up is a median with quartiles, next to its ceiling: the
    largest speed-up that the model's bytes allow.

    \b
    [bold]Examples[/bold]
    dart-eval bench decode --method griffin,dart
    dart-eval bench decode --method griffin --sparsity 0.5 --output out
    dart-eval bench decode --shape llama-3.2-1b --layers 4 --ffn-bits 4:128
    """
    hush(False)
    asked = config_of({"method": method or DEFAULT, "sparsity": sparsity, "ffn_bits": ffn_bits, **given})
    methods = methods_of(asked)
    from dart_eval.results import speeds

    if output is not None:
        check_name(output, "--output")
        check_target(f"{output}/{speeds.FOLDER}/decode.json", speeds.REMEDY)
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench.decode import Setting, check_length, check_timeable
    from dart_eval.bench.subject import subject, table

    for one in methods:
        check_timeable(one)
    timed = subject(asked, shape, layers, print_note)
    check_length(timed.model, prompt + steps, "prompt and steps", "give a shorter --prompt, or fewer --steps")
    roundings = [rounding for rounding in map(parse, asked.ffn_bits) if rounding]
    rows, files = [], []
    for row, speed in timed.rows(methods, sparsity, Setting(prompt, steps, rounds), roundings, print_note):
        rows.append(row)
        if output is not None:
            files.append(speeds.keep(output, speed))
    show([table(rows, timed.title)], format)
    for file in files:
        say(f"wrote {file}", err=format != "table")


@app.command("overhead")
def overhead(
    method: Methods = None,
    sparsity: Sparsity = 0.7,
    shape: Annotated[str, own(SHAPE_HELP, MODEL, "NAME")] = "llama-3.1-8b",
    format: Format = "table",
) -> None:
    """Count the state and FLOPs of methods on the shape of a large model, without its weights.

    The state of a method is allocated and fed random activations, so its
    bytes are real. FLOPs are counted from the shapes.

    \b
    [bold]Examples[/bold]
    dart-eval bench overhead
    dart-eval bench overhead --shape qwen2.5-1.5b --method dart,grinqh
    dart-eval bench overhead --sparsity 0.5 --format json
    """
    hush(False)
    methods = methods_of(config_of({"method": method or DEFAULT, "sparsity": sparsity}))
    silence()  # it imports torch, and all before it does not
    from dart_eval.bench.overhead import measure, table

    results = []
    for one in methods:
        print_note(f"counting {one.spec} on the shape of {shape}")
        results.append(measure(one, shape, sparsity))
    show([table(results)], format)
