"""`dart-eval bench overhead`: what methods keep and compute, and its table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli import bench_options
from dart_eval.cli.run import quieten
from dart_eval.cli.view import output
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.overhead import Overhead

PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")

Shape = Annotated[
    str,
    typer.Option(
        help="Shape of a model: llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.",
        rich_help_panel="Model",
        autocompletion=lambda: list(bench_options.SHAPES),
    ),
]


def overhead(
    method: bench_options.Methods = bench_options.DECODED,
    sparsity: bench_options.Sparsity = 0.7,
    shape: Shape = "llama-3.1-8b",
    format: bench_options.Format = "table",
) -> None:
    """Count what methods keep (bytes) and add (FLOPs) on the shapes of a large model, without its weights.

    The state of a method is allocated and fed with random activations, so
    its bytes are the real ones. FLOPs are counted from the shapes.

    \b
    [bold]Examples[/bold]
    dart-eval bench overhead
    dart-eval bench overhead --shape qwen2.5-1.5b --method dart,dart-plus
    dart-eval bench overhead --sparsity 0.5 --format json
    """
    quieten(False)
    bench_options.check_format(format)
    from dart_eval.bench.overhead import measure

    found = [measure(m, shape, sparsity) for m in bench_options.chosen(method, sparsity)]
    output([dataclasses.asdict(f) for f in found], table(found), format)


def table(found: list[Overhead]) -> Table:
    """The overhead of several methods, for people."""
    lengths = list(found[0].state_bytes)
    columns = [
        "method", *(f"state, {n} tokens" for n in lengths), *PARTS,
        "per decoded token", "per prompt token", "one re-mask", "re-mask reads", "steady re-masks",
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
        "inputs, measured after prompts of these lengths. FLOPs are held against a dense decoded token's at 1024 "
        "tokens of context: what the method adds per decoded and per prompt token; one re-mask of all layers, in dense "
        "tokens; steady re-masks, per decoded token. Re-masks after alarms come on top, as often as the text drifts. "
        "Re-mask reads: FFN weights that one re-mask reads / all FFN weights."
    )
    return Table("Overhead", columns, body, note)
