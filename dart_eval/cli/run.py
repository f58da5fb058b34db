"""`dart-eval run`: a sweep of cells."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_eval.cli.view import TerminalView, print_tables

EXAMPLES = """
[bold]Examples[/bold]

  dart-eval run --tasks smoke                                   the demo model on the shipped tasks

  dart-eval run --sparsity 0.7 --tasks arc,hellaswag --limit 100

  dart-eval run --model meta-llama/Llama-3.1-8B --dtype bfloat16 --sparsity 0.5,0.7 --tasks arc,xsum

  dart-eval run --method dart,dart:allocation=uniform:detect=off --sparsity 0.5 --tasks hellaswag --data-dir DIR

  dart-eval run --config run.yaml --limit 20
"""


def run(
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, comma-separated: arc, hellaswag, mmlu, xsum, smoke ...")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Methods, comma-separated: NAME or NAME:key=value:key=value.  [default: dense,griffin,dart]"),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Pruned fractions of the FFN neurons, comma-separated.  [default: 0.5]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, local folder or gemma-3-270m.  [default: the demo model]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: auto]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.  [default: auto]")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread the model over GPUs, e.g. auto.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each item.  [default: the task's own]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task only.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Contexts per forward; no effect on float32 results.  [default: 8]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of few-shot sampling and random masks.  [default: 0]")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens, context and continuation.  [default: the model's]")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per perplexity chunk.  [default: 2048]")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", help="Use the model's chat template.")
    ] = None,
    cue: Annotated[
        str | None,
        typer.Option(help="What follows the document in summarisation prompts.  [default: TL;DR:]"),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Local data instead of the hub.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text file for static methods.  [default: the project's own]")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of results.  [default: out]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with these options; the command line wins.")] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Run finished cells again.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the libraries' messages and tracebacks.")] = False,
) -> None:
    """Run methods at sparsities on tasks. Finished cells are skipped; the tables come at the end."""
    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("config", "verbose")}
    _quieten(verbose)
    # The heavy imports come after `--help` and the shape of the options are settled.
    from dart_eval.executors.local import run as run_local
    from dart_eval.plan import config_from

    settings = config_from(config, given)
    with TerminalView() as view:
        result = run_local(settings, view)
    print_tables(result.records)
    if result.failed:
        raise typer.Exit(1)


run.__doc__ = f"{run.__doc__}\n{EXAMPLES}"


def _quieten(verbose: bool) -> None:
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
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    for name in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
