"""`dart-eval bench`: what methods cost."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from dart_eval.cli.run import quieten
from dart_eval.cli.view import show
from dart_eval.errors import UserError
from dart_eval.results.writers import Table, markdown

FORMATS = ("table", "md", "json")


def bench(
    overhead: Annotated[
        bool,
        typer.Option("--overhead", metavar="", help="State in bytes and tracing FLOPs, on a shape without weights."),
    ] = False,
    shape: Annotated[str, typer.Option(help="llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.")] = "llama-3.1-8b",
    method: Annotated[
        str, typer.Option(help="Methods, comma-separated: NAME or NAME:key=value.")
    ] = "griffin,dart,dart-code,dart-plus",
    sparsity: Annotated[float, typer.Option(help="Pruned fraction of all FFN neurons.")] = 0.7,
    format: Annotated[str, typer.Option(help="table, md or json.")] = "table",
) -> None:
    """Measure what methods keep and compute beside the model.

    [bold]Examples[/bold]

      dart-eval bench --overhead --shape llama-3.1-8b

      dart-eval bench --overhead --method dart:ring=16 --format json
    """
    quieten(False)
    from dart_eval.overhead import measure
    from dart_eval.pruning.registry import make, parse
    from dart_eval.pruning.session import check_sparsity

    if not overhead:
        raise UserError("nothing to measure", "give --overhead")
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", f"one of {', '.join(FORMATS)}")
    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in method.split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", "for example --method dart,dart-plus")
    found = [measure(m, shape, sparsity) for m in methods]
    if format == "json":
        typer.echo(json.dumps([dataclasses.asdict(f) for f in found], indent=1))
        return
    made = table(found)
    if format == "md":
        typer.echo(markdown(made))
    else:
        show(made)


PARTS = ("scores", "masks", "compensation", "recent inputs", "detector")


def table(found: list) -> Table:
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
