"""`dart-eval run`: a sweep of cells."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dart_eval.cli import options
from dart_eval.cli.view import TerminalView, print_tables, say

if TYPE_CHECKING:
    from dart_eval.executors.jobs import RunResult

EXAMPLES = """
[bold]Examples[/bold]

\b
dart-eval run --tasks smoke
dart-eval run --sparsity 0.7 --tasks arc,hellaswag --limit 100
dart-eval run --tasks smoke_drift --method dart,dart:allocation=uniform
dart-eval run --tasks arc,xsum --model meta-llama/Llama-3.1-8B
dart-eval run --tasks hellaswag --data-dir DIR --limit 20
dart-eval run --config run.yaml
"""


def run(
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke ...")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=r"Methods, comma-separated: NAME or NAME:key=value:key=value.  \[default: dense,griffin,dart]"
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help=r"Pruned fractions of all FFN neurons, 0 to below 1, comma-separated.  \[default: 0.5]"),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help=r"What runs pruned where answers are scored: scored, or all and last of other papers.  "
            r"\[default: scored]"
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help=r"Sparsity over layers: uniform, depth or table:FILE.  \[default: each method's own]"),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = None,
    confirm_run_unsafe_code: options.UnsafeCode = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help=r"Examples before each item.  \[default: the task's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N items of each task (of each member of a group).")
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help=r"Contexts per forward, or auto: as many as fit; no effect on float32 results.  \[default: 8]",
        ),
    ] = None,
    share_prefix: Annotated[
        bool | None,
        typer.Option(
            "--share-prefix/--no-share-prefix",
            help=r"Run what many contexts begin with (few-shot examples) once.  \[default: share]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=r"Seed of few-shot sampling and random masks.  \[default: 0]")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help=r"Longest sequence in tokens, context and answer together.  \[default: the model's]"),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help=r"Tokens per perplexity chunk.  \[default: 2048]")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", metavar="", help="Use the model's chat template.")
    ] = None,
    cue: Annotated[
        str | None,
        typer.Option(help=r"What follows the document in summarisation prompts.  \[default: TL;DR:]"),
    ] = None,
    data_dir: options.DataDir = None,
    calibration: Annotated[
        str | None, typer.Option(help=r"Text file that wanda-sp calibrates on.  \[default: the project's own]")
    ] = None,
    output: Annotated[str | None, typer.Option(help=r"Folder of results.  \[default: out]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with these options; the command line wins.")] = None,
    log: Annotated[str | None, typer.Option(help="Also log finished cells: wandb or trackio.")] = None,
    log_project: Annotated[str | None, typer.Option(help=r"Project to log under.  \[default: dart-eval]")] = None,
    force: Annotated[bool | None, typer.Option("--force", metavar="", help="Run finished cells again.")] = None,
    executor: options.Executor = None,
    ray_address: options.RayAddress = None,
    gpus_per_cell: options.GpusPerCell = None,
    cpus_per_cell: options.CpusPerCell = None,
    shards: options.Shards = None,
    plan: Annotated[
        bool, typer.Option("--plan", metavar="", help="Only say what it will take: tokens, FLOPs, memory, time.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", metavar="", help="Show the libraries' messages and tracebacks.")
    ] = False,
) -> None:
    """Run methods at sparsities on tasks. Finished cells are skipped; the tables come at the end."""
    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("config", "plan", "verbose")}
    quieten(verbose)
    # The heavy imports come after `--help` and the shape of the options are settled.
    from dart_eval.executors import run_all
    from dart_eval.executors.sizing import held_against
    from dart_eval.executors.tracking import tracked
    from dart_eval.plan import config_from
    from dart_eval.results import detector
    from dart_eval.results.store import Store

    settings = config_from(config, given)
    if plan:
        from dart_eval.cli import plan_table

        plan_table.run(settings)
        return
    with TerminalView() as terminal, tracked(terminal, settings.log, settings.log_project, settings) as view:
        result = run_all([settings], view)
        if line := held_against(settings.output, result.records):
            view.note(line)
    print_tables(result.records, detector.tables(Store(settings.output), result.records))
    finish(result, settings.output)


def finish(result: RunResult, output: str) -> None:
    """End with status 1 where cells failed, or where files of finished ones have been taken away meanwhile."""
    if result.failed:
        names = ", ".join(cell.title for cell in result.failed)
        say(f"failed: {names}; tracebacks in {output}/failed", err=True)
    if result.lost:
        names = ", ".join(f"{cell.title} ({files[0]})" for cell, files in result.lost)
        say(f"missing: files of finished cells have been deleted: {names}; the same command runs them again", err=True)
    if result.failed or result.lost:
        raise typer.Exit(1)


run.__doc__ = f"{run.__doc__}\n{EXAMPLES}"


def quieten(verbose: bool) -> None:
    """Silence the libraries underneath, or let them speak."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if verbose:
        for noisy in (
            "filelock",
            "fsspec",
            "urllib3",
            "httpx",
            "httpcore",
            "matplotlib",
            "asyncio",
            "lm_eval.tasks",
        ):
            logging.getLogger(noisy).setLevel(logging.INFO)
        return
    from dart_eval.quiet import silence

    silence()
