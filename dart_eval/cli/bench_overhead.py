"""`dart-eval bench --overhead`: what methods keep and compute, and its table."""

from __future__ import annotations

import dataclasses
from typing import Any

from dart_eval.cli.view import output
from dart_eval.results.writers import Table

PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")


def run(methods: list[Any], sparsity: float, shape: str, format: str) -> None:
    """Measure every method, and print the table.

    Raises:
        UserError: unknown shape.
    """
    from dart_eval.bench.overhead import measure

    found = [measure(m, shape, sparsity) for m in methods]
    output([dataclasses.asdict(f) for f in found], table(found), format)


def table(found: list) -> Table:
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
