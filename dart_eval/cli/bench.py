"""`dart-eval bench`: what methods cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_eval.cli.run import quieten
from dart_eval.cli.view import show
from dart_eval.errors import UserError
from dart_eval.results.writers import Table, markdown

FORMATS = ("table", "md", "json")
COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def bench(
    overhead: Annotated[
        bool,
        typer.Option("--overhead", metavar="", help="State in bytes and tracing FLOPs, on a shape without weights."),
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help=r"Random weights of this shape: llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.  \[default: none; with "
            "--overhead llama-3.1-8b]"
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="So many layers of the shape.")] = None,
    model: Annotated[
        str | None, typer.Option(help=r"Hub id, local folder or gemma-3-270m.  \[default: the demo model]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    method: Annotated[
        str, typer.Option(help="Methods, comma-separated: NAME or NAME:key=value.")
    ] = "griffin,dart,dart-code,dart-plus",
    sparsity: Annotated[float, typer.Option(help="Pruned fraction of all FFN neurons.")] = 0.7,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    steps: Annotated[int, typer.Option(help="Decoded tokens in a round.")] = 30,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed, after one that warms up.")] = 3,
    compile: Annotated[
        str | None,
        typer.Option(help="Decode through torch.compile in this mode: default, or reduce-overhead (CUDA graphs)."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Also write a trace of torch's profiler (a few pruned steps of the last method)."),
    ] = None,
    format: Annotated[str, typer.Option(help="table, md or json.")] = "table",
) -> None:
    """Measure how fast methods decode, and what they keep and compute beside the model.

    One sequence; dense, a no-op control and the method take turns step by step, and ratios are medians of neighbours.

    [bold]Examples[/bold]

      dart-eval bench --method griffin,dart

      dart-eval bench --shape llama-3.2-1b --layers 4 --dtype bfloat16 --format json

      dart-eval bench --overhead --shape llama-3.1-8b
    """
    quieten(False)
    if compile is not None and compile not in COMPILE:
        raise UserError(f"unknown compile mode {compile!r}", f"one of {', '.join(COMPILE)}")
    from dart_eval.pruning.registry import make, parse
    from dart_eval.pruning.session import check_sparsity

    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", f"one of {', '.join(FORMATS)}")
    for name, value in (("--prompt", prompt), ("--steps", steps), ("--rounds", rounds)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in method.split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", "for example --method dart,dart-plus")
    if overhead:
        from dart_eval.bench.overhead import measure as overhead_of

        found: list[Any] = [overhead_of(m, shape or "llama-3.1-8b", sparsity) for m in methods]
        made = overhead_table(found)
    else:
        if shape is not None and model is not None:
            raise UserError("--shape and --model are both given", "leave one of them out")
        found, made = _decode(
            methods, sparsity, shape, layers, model, dtype, device, prompt, steps, rounds, compile, profile
        )
    if format == "json":
        from dart_eval.bench.decode import row

        typer.echo(json.dumps([dataclasses.asdict(f) if overhead else row(f) for f in found], indent=1))
    elif format == "md":
        typer.echo(markdown(made))
    else:
        show(made)


def _decode(
    methods: list[Any], sparsity: float, shape: str | None, layers: int | None, model: str | None, dtype: str,
    device: str, prompt: int, steps: int, rounds: int, compiled: str | None, profile: Path | None,
) -> tuple[list[Any], Table]:  # fmt: skip
    import torch

    from dart_eval import shapes
    from dart_eval.bench import decode
    from dart_eval.models import DTYPES, ModelSpec, pick_device, resolve

    if shape is None:
        if layers is not None:
            raise UserError("--layers is for a shape", "give --shape, or leave it out")
        resolved = resolve(ModelSpec(name=model, dtype=dtype, device=device))
        loaded, tokenizer = resolved.load()
        named = f"{resolved.identity.name}, {resolved.dtype}"
    else:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
        kind: Any = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
        loaded, tokenizer = shapes.with_random_weights(shape, layers, kind, pick_device(device)), None
        named = f"{shape} (random weights), {len(decode.find_ffns(loaded))} layers, {str(kind).removeprefix('torch.')}"
    found = [
        decode.measure(
            loaded, m, sparsity, tokenizer=tokenizer, prompt_tokens=prompt, steps=steps, rounds=rounds,
            compiled=compiled,
        )
        for m in methods
    ]  # fmt: skip
    if profile is not None:
        decode.profile(loaded, methods[-1], sparsity, str(profile), tokenizer=tokenizer, prompt_tokens=prompt)
    cuda = loaded.device.type == "cuda"
    where = torch.cuda.get_device_name(loaded.device) if cuda else f"{torch.get_num_threads()} threads"
    if compiled is not None:
        where += f", torch.compile ({compiled})"
    return found, decode_table(found, f"{named}, {where}")


def decode_table(found: list[Any], where: str) -> Table:
    """Decoding speed of several methods, for people."""
    columns = [
        "method", "FFN read", "speed-up", "ceiling", "of it", "control", "first token", "re-mask", "renewal", "tracing",
        "tokens/s", "extra weights", "state MB",
    ]  # fmt: skip
    body = [
        [
            f.method,
            f"{f.weights_read:.2f}" + (f" ({f.weights_executed:.2f})" if f.weights_executed != f.weights_read else ""),
            _ratio(f.speedup, 2, "x"), f"{f.ceiling:.2f}x", f"{f.achieved_over_ceiling:.2f}", _ratio(f.control, 2, "x"),
            f"{f.first_token.median:.2f}x", f"{f.remask_dense_steps.median:.2f}",
            f"{f.renewal_dense_steps.median:.2f}" if f.renewal_dense_steps else "-",
            f"{100 * f.tracing_overhead.median:.1f} %", f"{f.tokens_per_second:.1f} ({f.dense_tokens_per_second:.1f})",
            f"{f.extra_weight_bytes / 10**6:.0f} MB", f"{(f.state_bytes + f.order_bytes) / 10**6:.2f}",
        ]
        for f in found
    ]  # fmt: skip
    foreign = [f.foreign_cores for f in found if f.foreign_cores is not None]
    busy = f" Other processes kept {max(foreign):.2f} cores busy at most." if foreign else ""
    note = (
        f"{where}; sparsity {found[0].sparsity:g}, one sequence, {found[0].speedup.n} steps a method. Speed-up over "
        "dense, median [quartiles] of neighbouring steps; control: dense over dense. Ceiling: what the bytes of this "
        "model allow at the FFN weights read (in brackets: those that are multiplied, where a token picks inside its "
        "mask). First token: prompt, masks and reordering, over a dense prompt. In dense steps: re-mask, exchanging a "
        "fifth of the kept neurons; renewal, new scores and masks from recent tokens. Tracing: what watching adds to a "
        f"pruned step. Tokens/s: to orient, dense in brackets. State: of the method, and the neurons' order.{busy}"
    )
    return Table("Decoding", columns, body, note)


def _ratio(ratio: Any, digits: int, unit: str) -> str:
    return f"{ratio.median:.{digits}f}{unit} [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"


PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")


def overhead_table(found: list) -> Table:
    """The overhead of several methods, for people."""
    lengths = list(found[0].state_bytes)
    columns = [
        "method", *(f"state, {n} tokens" for n in lengths), *PARTS,
        "per decoded token", "per prompt token", "one renewal", "its reads", "steady renewals",
    ]  # fmt: skip
    body = []
    for f in found:
        every = f"every {f.remask_every}: {100 * f.remask_tokens / f.remask_every:.1f} %" if f.remask_every else "none"
        body.append([
            f.method, *(f"{b / 10**6:.3f}" for b in f.state_bytes.values()),
            *(f"{f.parts.get(part, 0) / 10**6:.3f}" for part in PARTS),
            f"{100 * f.decode_share:.4f} %", f"{100 * f.scoring_share:.4f} %", f"{f.remask_tokens:.2f} tokens",
            f"{f.remask_read:.2f}", every,
        ])  # fmt: skip
    note = (
        f"Shape {found[0].shape}, sparsity {found[0].sparsity:g}. State in megabytes (10^6) per sequence, bfloat16 "
        "inputs, measured after prompts of these lengths. FLOPs as shares of a dense decoded token's at 1024 tokens of "
        "context: of tracing per decoded and per prompt token; of one renewal of all masks, in dense tokens (its "
        "reads: FFN weights, over all of them); of steady renewals per decoded token. Renewals after alarms come on "
        "top, as often as the text drifts."
    )
    return Table("Overhead", columns, body, note)
