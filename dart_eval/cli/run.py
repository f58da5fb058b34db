"""`dart-eval run`: a sweep of cells."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli.options import Verbose, own, takes
from dart_eval.cli.view import TerminalView, say
from dart_eval.results.show import show
from dart_eval.sweep.events import Event, Tell
from dart_eval.sweep.options import DEFAULTS, MODEL, OUTPUT
from dart_eval.util.quiet import hush_warnings, silence
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.results.record import Record
    from dart_eval.results.store import Store
    from dart_eval.sweep.options import RunConfig
    from dart_eval.sweep.run import Sweep


MODEL_ARGS_HELP = "Give the model as lm-eval does: pretrained=NAME, dtype=TYPE ..."
CONFIG_HELP = "Read options from a YAML file; the command line overrides it."


@takes(*DEFAULTS)
def run(
    model_args: Annotated[list[str] | None, own(MODEL_ARGS_HELP, MODEL, "K=V,...", "--model-args", "-a")] = None,
    config: Annotated[Path | None, own(CONFIG_HELP, OUTPUT, "FILE", "--config", "-C")] = None,
    verbose: Verbose = False,
    **given: object,
) -> None:
    """Run methods at sparsities on tasks, and print the board. Finished cells are skipped.

    \b
    [bold]Examples[/bold]
    dart-eval run --tasks smoke
    dart-eval run --sparsity 0.7 --tasks arc,hellaswag --limit 100
    dart-eval run --tasks smoke_drift --method dart,dart:allocation=uniform
    dart-eval run --tasks arc,xsum --model meta-llama/Llama-3.1-8B
    dart-eval run --tasks hellaswag --data-dir DIR --limit 20
    dart-eval run --config run.yaml
    """
    hush(verbose)
    run_cells(understood(config, {"model_args": model_args, **given}), verbose)


def run_cells(configs: list[RunConfig], verbose: bool) -> None:
    """Run the unfinished cells, then show the board.

    Raises:
        typer.Exit: cells failed.
    """
    with TerminalView() as tell:
        load_libraries(tell, verbose)
        from dart_eval.cluster.run import run_all

        sweep = run_all(configs, tell)
    if sweep.records:
        show_results(sweep.store, sweep.records)
    finish(sweep)


def show_results(store: Store, records: Sequence[Record]) -> None:
    """Show the board of a run's records, the folder of its results and the commands that may follow."""
    from dart_eval.results.board import boards, newest
    from dart_eval.results.frame import with_dense
    from dart_eval.results.tables import board_tables

    everything, _ = newest(store.load())
    show(*board_tables(boards(store, with_dense(records, everything))))
    quoted = shlex.quote(str(store.folder))
    say(f"\nResults: {store.folder}\nNext: dart-eval report {quoted}\n      dart-eval tables {quoted} --view long")


def understood(file: Path | None, given: Json) -> list[RunConfig]:
    """Return the configurations of a run, one for each seed; wrong names are refused before torch is imported.

    Raises:
        UserError: the input is wrong.
    """
    from dart_eval.evaluation import task_names
    from dart_eval.pruning.registry import check_name, parse
    from dart_eval.sweep.options import configs_from

    found = configs_from(file, given)
    for spec in found[0].method:
        check_name(parse(spec)[0])
    with TerminalView() as tell:
        tell(Event("wait", "looking up tasks"))  # lm-eval's take a while, once
        task_names.expand(found[0].tasks, found[0].include_path)
    return found


def load_libraries(tell: Tell, verbose: bool) -> None:
    """Import what takes seconds, once everything that can be refused without it has been."""
    tell(Event("wait", "loading torch and lm-eval"))
    if not verbose:
        silence()


def finish(sweep: Sweep) -> None:
    """Exit with status 1 if cells failed."""
    if sweep.failed:
        names = ", ".join(cell.title for cell in sweep.failed)
        say(f"failed: {names}; tracebacks in {sweep.store.folder}/failed", err=True)
        raise typer.Exit(1)


def hush(verbose: bool) -> None:
    """Set which warnings and errors are shown, before the libraries are imported."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if verbose:
        logging.getLogger("dart_eval").setLevel(logging.DEBUG)
    else:
        hush_warnings()
