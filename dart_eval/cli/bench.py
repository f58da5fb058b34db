"""`dart-eval bench`: what methods cost, how fast they decode, and how fast answers are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli import options
from dart_eval.cli.run import quieten
from dart_eval.errors import UserError

FORMATS = ("table", "md", "json")


def bench(
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead", metavar="", help="Measure what methods keep (bytes) and add (FLOPs), without a model."
        ),
    ] = False,
    scoring: Annotated[
        bool, typer.Option("--scoring", metavar="", help="Measure how fast answers are scored, beside lm-eval's HFLM.")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    trust_remote_code: options.TrustRemoteCode = None,
    method: Annotated[
        str, typer.Option(help="Methods, comma-separated: NAME or NAME:key=value.")
    ] = "griffin,dart,dart-code,dart-plus",
    sparsity: Annotated[float, typer.Option(help="Pruned fraction of all FFN neurons.")] = 0.7,
    prompt: Annotated[int, typer.Option(help="Decoding: tokens of a prompt.")] = 128,
    steps: Annotated[int, typer.Option(help="Decoding: tokens of a round.")] = 30,
    rounds: Annotated[int, typer.Option(help="How often all sides are timed, in turn.")] = 3,
    compile: Annotated[
        str | None,
        typer.Option(help="Decoding: through torch.compile in this mode, default or reduce-overhead (CUDA graphs)."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Decoding: write a trace of torch's profiler, a few pruned steps of the last method."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Scoring: tasks, comma-separated.")] = "arc,hellaswag,mmlu",
    limit: Annotated[int | None, typer.Option(help="Scoring: only the first N items of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Scoring: examples before each item.")] = None,
    batch_size: Annotated[int, typer.Option(help="Scoring: of both sides; ours also runs under auto.")] = 8,
    data_dir: Annotated[str | None, typer.Option(help="Scoring: local data instead of the hub.")] = None,
    format: Annotated[str, typer.Option(help="table, md or json.")] = "table",
) -> None:
    """Measure how fast methods decode; with a flag what they keep and compute, or how fast answers are scored.

    Decoding: one sequence; dense, a no-op control and the method take turns step by step.

    [bold]Examples[/bold]

      dart-eval bench --method griffin,dart

      dart-eval bench --shape llama-3.2-1b --layers 4 --dtype bfloat16 --format json

      dart-eval bench --overhead --shape llama-3.1-8b

      dart-eval bench --scoring --tasks arc,hellaswag,mmlu --limit 50 --data-dir DIR
    """
    quieten(False)
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", f"one of {', '.join(FORMATS)}")
    if overhead and scoring:
        raise UserError("--overhead and --scoring are two measurements", "give one of them")
    from dart_eval.models import ModelSpec

    spec = ModelSpec(model, None, dtype, device, trust_remote_code=bool(trust_remote_code))
    if scoring:
        from dart_eval.cli import bench_scoring

        bench_scoring.run(tasks, spec, data_dir, batch_size, rounds, limit, num_fewshot, format)
        return
    from dart_eval.pruning.prune import check_sparsity
    from dart_eval.pruning.registry import make, parse

    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in method.split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", "for example --method dart,dart-plus")
    if overhead:
        from dart_eval.cli import bench_overhead

        bench_overhead.run(methods, sparsity, shape or "llama-3.1-8b", format)
        return
    from dart_eval.cli import bench_decode

    bench_decode.run(methods, sparsity, shape, layers, spec, prompt, steps, rounds, compile, profile, format)
