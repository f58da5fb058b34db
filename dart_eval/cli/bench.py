"""`dart-eval bench`: what methods cost, how fast they decode, and how fast answers are scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dart_eval.cli import options
from dart_eval.cli.run import quieten
from dart_eval.errors import UserError

if TYPE_CHECKING:
    from dart_eval.pruning.method import Pruner

FORMATS = ("table", "md", "json")
DECODED = "griffin,dart,dart-code,dart-plus"


def bench(
    overhead: options.BenchOverhead = False,
    scoring: options.BenchScoring = False,
    shape: options.BenchShape = None,
    layers: options.BenchLayers = None,
    model: options.Model = None,
    dtype: options.OneDtype = "auto",
    device: options.OneDevice = "auto",
    trust_remote_code: options.TrustRemoteCode = None,
    method: options.BenchMethod = None,
    sparsity: options.OneSparsity = 0.7,
    prompt: options.BenchPrompt = 128,
    steps: options.BenchSteps = 30,
    rounds: options.BenchRounds = 3,
    compile: options.BenchCompile = None,
    profile: options.BenchProfile = None,
    tasks: options.BenchTasks = "arc,hellaswag,mmlu",
    limit: options.BenchLimit = None,
    num_fewshot: options.BenchNumFewshot = None,
    batch_size: options.BenchBatchSize = 8,
    data_dir: options.BenchDataDir = None,
    format: options.BenchFormat = "table",
) -> None:
    """Measure how fast methods decode; with a flag what they keep and add, or how fast answers are scored.

    One sequence is decoded. Dense, dense once more as a control, and the method take turns, step by step.

    [bold]Examples[/bold]

      dart-eval bench --method griffin,dart

      dart-eval bench --shape llama-3.2-1b --layers 4 --dtype bfloat16 --format json

      dart-eval bench --overhead --shape llama-3.1-8b

      dart-eval bench --scoring --tasks arc,hellaswag,mmlu --limit 50 --data-dir DIR

      dart-eval bench --scoring --tasks smoke_questions --method griffin,cats,dart-plus --sparsity 0.5
    """
    quieten(False)
    _check(format, overhead, scoring)
    from dart_eval.models import ModelSpec

    spec = ModelSpec(model, None, dtype, device, trust_remote_code=bool(trust_remote_code))
    if scoring:
        from dart_eval.cli import bench_scoring

        asked = bench_scoring.Asked(tasks, data_dir, batch_size, rounds, limit, num_fewshot)
        methods = None if method is None else _methods(method, sparsity, "griffin,cats")
        bench_scoring.run(asked, spec, methods, sparsity, format)
    elif overhead:
        from dart_eval.cli import bench_overhead

        bench_overhead.run(_methods(method, sparsity), sparsity, shape or "llama-3.1-8b", format)
    else:
        from dart_eval.cli import bench_decode

        methods = _methods(method, sparsity)
        bench_decode.run(methods, sparsity, shape, layers, spec, prompt, steps, rounds, compile, profile, format)


def _check(format: str, overhead: bool, scoring: bool) -> None:
    """Raise UserError unless one measurement is asked for, in a form that there is."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", f"one of {', '.join(FORMATS)}")
    if overhead and scoring:
        raise UserError("--overhead and --scoring are two measurements", "give one of them")


def _methods(named: str | None, sparsity: float, example: str = "dart,dart-plus") -> list[Pruner]:
    """The methods of a comma-separated list or, without one, `DECODED`; the sparsity is checked before them.

    Args:
        example: what to give, for the message where the list is empty.
    """
    from dart_eval.pruning.prune import check_sparsity
    from dart_eval.pruning.registry import make, parse

    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in (DECODED if named is None else named).split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", f"for example --method {example}")
    return methods
