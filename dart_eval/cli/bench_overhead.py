"""`dart-eval bench overhead`: what methods keep and compute, as two tables."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli import bench_options, complete, options
from dart_eval.cli.run import hush, quieten
from dart_eval.cli.view import output
from dart_eval.results.format import sparsity as said
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.overhead import Overhead

PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")

Shape = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Take the shapes of this model: llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.",
        rich_help_panel=options.MODEL,
        autocompletion=complete.words(bench_options.SHAPES),
    ),
]


def overhead(
    method: bench_options.Methods = bench_options.DECODED,
    sparsity: options.OneSparsity = 0.7,
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
    hush(False)
    bench_options.check_format(format)
    methods = bench_options.chosen(method, sparsity)
    quieten(False)  # it imports torch, and all before it does not
    from dart_eval.bench.overhead import measure

    found = [measure(m, shape, sparsity) for m in methods]
    data = [dataclasses.asdict(f) for f in found]
    output(data, state(found), format)
    if format != "json":
        print()
        output(data, work(found), format)


def state(found: list[Overhead]) -> Table:
    """What the methods keep, for people."""
    lengths = list(found[0].state_bytes)
    columns = ["method", *(f"{n} tokens" for n in lengths), *PARTS]
    body = [
        [
            f.method,
            *(f"{size / 10**6:.2f}" for size in f.state_bytes.values()),
            *(f"{f.parts.get(part, 0) / 10**6:.2f}" for part in PARTS),
        ]
        for f in found
    ]
    note = (
        f"Shape {found[0].shape}, sparsity {said(found[0].sparsity)}. Megabytes (10^6 bytes) for each sequence, after "
        "prompts of these lengths, and what they are for after the longest prompt. FFN inputs are bfloat16."
    )
    return Table("State", columns, body, note)


def work(found: list[Overhead]) -> Table:
    """What the methods compute, for people."""
    columns = ["method", "decoded token", "prompt token", "re-mask", "re-mask reads", "steady re-masks"]
    body = []
    for f in found:
        every = f"every {f.remask_every}: {100 * f.remask_tokens / f.remask_every:.1f} %" if f.remask_every else "none"
        body.append([
            f.method, f"{100 * f.decode_share:.4f} %", f"{100 * f.scoring_share:.4f} %",
            f"{f.remask_tokens:.2f}" if f.remask_tokens else "-", f"{f.remask_read:.2f}" if f.remask_read else "-",
            every,
        ])  # fmt: skip
    note = (
        "FLOPs that the method adds to a decoded token and to a token of the prompt, over those of a dense decoded "
        "token at 1024 tokens of context. Re-mask: FLOPs of one, over all layers, in dense tokens. Re-mask reads: the "
        "FFN weights that one reads / all FFN weights. Steady re-masks come every so many tokens, and add that share "
        "to each. Those after an alarm come on top, as often as the text drifts."
    )
    return Table("Work", columns, body, note)
