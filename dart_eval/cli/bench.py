"""`dart-eval bench`: what methods cost, and how fast answers are scored."""

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
    scoring: Annotated[
        bool, typer.Option("--scoring", metavar="", help="Speed of scoring answers, beside lm-eval's own HFLM.")
    ] = False,
    shape: Annotated[str, typer.Option(help="llama-3.1-8b, llama-3.2-1b or qwen2.5-1.5b.")] = "llama-3.1-8b",
    method: Annotated[
        str, typer.Option(help="Methods, comma-separated: NAME or NAME:key=value.")
    ] = "griffin,dart,dart-code,dart-plus",
    sparsity: Annotated[float, typer.Option(help="Pruned fraction of all FFN neurons.")] = 0.7,
    tasks: Annotated[str, typer.Option(help="Tasks of --scoring, comma-separated.")] = "arc,hellaswag,mmlu",
    limit: Annotated[int | None, typer.Option(help="Only the first N items of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each item.")] = None,
    batch_size: Annotated[int, typer.Option(help="Of both sides; ours also runs under auto.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often all sides are timed, in turn.")] = 3,
    model: Annotated[
        str | None, typer.Option(help=r"Hub id, local folder or gemma-3-270m.  \[default: the demo model]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    data_dir: Annotated[str | None, typer.Option(help="Local data instead of the hub.")] = None,
    format: Annotated[str, typer.Option(help="table, md or json.")] = "table",
) -> None:
    """Measure what methods keep and compute beside the model, or how fast answers are scored.

    [bold]Examples[/bold]

      dart-eval bench --overhead --shape llama-3.1-8b

      dart-eval bench --overhead --method dart:ring=16 --format json

      dart-eval bench --scoring --tasks arc,hellaswag,mmlu --limit 50 --data-dir DIR
    """
    quieten(False)
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", f"one of {', '.join(FORMATS)}")
    modes = [name for name, given in (("--overhead", overhead), ("--scoring", scoring)) if given]
    if len(modes) != 1:
        raise UserError(
            f"{' and '.join(modes)} are two measurements" if modes else "nothing to measure",
            "give one of --overhead and --scoring",
        )
    if scoring:
        from dart_eval.cli import bench_scoring
        from dart_eval.models import ModelSpec

        bench_scoring.run(
            tasks, ModelSpec(model, None, dtype, device), data_dir, batch_size, rounds, limit, num_fewshot, format
        )
        return
    from dart_eval.overhead import measure
    from dart_eval.pruning.registry import make, parse
    from dart_eval.pruning.session import check_sparsity

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
