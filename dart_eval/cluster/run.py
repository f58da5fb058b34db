"""Where the cells of a plan run: in this process, in several on this machine, or on Ray.

On Ray (one machine, several GPUs, a Slurm allocation or a cluster) a cell is a task, for which Ray finds a place, and
which it repeats if its process is lost. This process, the driver, claims cells, and alone writes what they return; so
no disk has to be shared. Keys, records and folders are those of any run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import resolve
from dart_eval.results.record import Record
from dart_eval.results.store import Journal
from dart_eval.sweep import run, workers
from dart_eval.sweep.events import Event, Tell, silent
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import Cell
from dart_eval.util.errors import Misfit, UserError, summary
from dart_eval.util.quiet import silence
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.models.loaded import Loaded
    from dart_eval.sweep.worker import Worker

TRIES = 3  # more, where the process at work on a cell is lost
AHEAD = 256  # cells that Ray has at once: the claim of each is an open file
POLL = 0.5  # seconds between looks: Ray keeps Ctrl-C back while it waits


def run_all(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False, model: Loaded | None = None
) -> run.Sweep:
    """Run several sweeps of one model into one folder, where the first one says.

    Args:
        configs: they differ in methods, sparsities, bits, and in what a task is asked only.
        skip_missing: go on without tasks whose data cannot be had, and report them.
        model: a loaded one, which this process takes in place of that of the configurations.

    Raises:
        UserError: the input is wrong, or there is no such cluster. Nothing has been written.
    """
    first = configs[0]
    if first.workers > 1:
        return workers.run_all(configs, tell, skip_missing)
    if first.ray is None:
        device = model.model.device.type if model else None
        return run.begin_sweep(configs, tell, skip_missing, device, model).run_here()
    tell(Event("wait", "connecting to Ray"))
    with _connected(first.ray):
        import ray

        gpus = _gpus(first)
        device, spread = ("cuda", "auto" if gpus > 1 else None) if gpus else ("cpu", None)
        sweep = run.begin_sweep(configs, tell, skip_missing, device)
        common = dataclasses.replace(first, device=device, device_map=first.device_map or spread)
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES)(run_cell)

        def submit(cell: Cell, journal: Journal) -> object:
            config = dataclasses.replace(cell.config, tasks=(cell.task,))
            return remote.remote(config, cell.key, journal, common, os.getcwd())

        return sweep.work_through(lambda todo: _work(sweep, todo, submit))


def _work(sweep: run.Sweep, todo: Sequence[Cell], submit: Callable[[Cell, Journal], object]) -> None:
    """Run the cells that no other process has claimed, and write what comes of them."""
    import ray

    waiting, pending = iter(todo), dict[object, tuple[Cell, Journal, contextlib.ExitStack]]()
    with contextlib.ExitStack() as claims:
        while True:
            for cell in itertools.islice(waiting, AHEAD - len(pending)):
                claim = claims.enter_context(contextlib.ExitStack())
                journal = claim.enter_context(sweep.claim(cell))
                if journal is not None:
                    pending[submit(cell, journal)] = cell, journal, claim
            if not pending:
                return
            for found in ray.wait([*pending], timeout=POLL)[0]:
                cell, journal, claim = pending.pop(found)
                with claim:
                    try:
                        made: Made = ray.get(found)
                    except ray.exceptions.RayError as error:
                        sweep.fail(cell, f"the process at work on it was lost ({summary(error)})", str(error))
                        continue
                    if made.misfit is not None:
                        sweep.leave_out(cell, made.misfit)
                    elif made.record is not None:
                        sweep.save(cell, made.record, made.texts, journal)
                    else:
                        answers = {name: answer for name, answer in made.journal.items() if name not in journal}
                        journal.add(answers, made.journal.state_bytes, made.seconds)
                        sweep.fail(cell, *made.failure)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect to a cluster; `local` starts one on this machine for the length of the run."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the package ray", "pip install 'dart-eval[ray]'") from None
    if ray.is_initialized():  # the program around us has a cluster
        yield
        return
    terminate = signal.getsignal(signal.SIGTERM)
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0  # fewer in a Slurm step, say
    limited = ours if 0 < ours < (os.cpu_count() or 0) else None  # else Ray counts them, and knows of quotas
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": limited} if address == "local" else {}
    (host, _, port), here = address.rpartition(":"), os.getcwd()
    try:
        if port.isdigit():  # Ray would try for minutes where nobody listens
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=10).close()
        os.chdir(Path(__file__).resolve().parents[2])  # its workers import from where it was started
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({error})", "start one (`ray start --head`), or give --ray local"
        ) from None
    finally:
        os.chdir(here)
    with contextlib.suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGTERM, terminate)  # Ray has one of its own, which ends without a word
    try:
        yield
    finally:
        ray.shutdown()


def _gpus(config: RunConfig) -> int:
    """Return the GPUs of a cell.

    Raises:
        UserError: no node has so many: Ray would wait for one.
    """
    import ray

    most = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    gpus = config.gpus_per_cell or int(config.device == "cuda" or (config.device == "auto" and most > 0))
    if gpus > most:
        raise UserError(
            f"no node of the cluster has {gpus} GPUs for a cell (the largest: {most})",
            "give a smaller --gpus-per-cell, or --device cpu",
        )
    return gpus


# -- on a node, which holds no files -----------------------------------------------------------------------------


class Made(NamedTuple):
    """A cell's answers and the time they took here; its record and texts, or why it failed, in a line and in full.

    misfit: the method does not fit the model.
    """

    journal: Journal
    seconds: float
    record: Record | None = None
    texts: tuple[Json, ...] = ()
    failure: tuple[str, str] = ("", "")
    misfit: Misfit | None = None


def run_cell(config: RunConfig, key: str, journal: Journal, common: RunConfig, folder: str) -> Made:
    """Run a cell on this node.

    Args:
        config: with the cell's task alone. common: how the model of all cells is loaded.
        journal: of the driver, to be continued. folder: the driver's, from which relative paths count.
    """
    silence()
    with contextlib.suppress(OSError):  # where there is no such folder, paths must be absolute
        os.chdir(folder)
    if common.device == "cpu":
        torch.set_num_threads(1)  # the one that Ray gives
    start, journal.path = time.monotonic(), None
    try:
        worker = _loaded(common)
        # Own copies of the tasks: a run writes into lm-eval's, which would change their hashes.
        cells = run.begin_sweep([config], silent, device=common.device, model=worker.resolved).cells
        if key not in cells:
            problem = "this node would evaluate another cell than the driver planned"
            raise UserError(problem, "install the same versions and give every node the same model and --data-dir")
        run.refuse_misfit(cells[key], find_ffns(worker.model))
        outcome, record = worker.run(cells[key], journal)
    except Misfit as misfit:
        return Made(journal, time.monotonic() - start, misfit=misfit)
    except Exception as error:
        failure = summary(error), "".join(traceback.format_exception(error))
        return Made(journal, time.monotonic() - start, failure=failure)
    return Made(journal, time.monotonic() - start, record, tuple(outcome.texts))


@functools.lru_cache(maxsize=1)
def _loaded(common: RunConfig) -> Worker:
    """Load the model; Ray runs one cell after another in a process without a GPU."""
    from dart_eval.sweep.worker import Worker

    return Worker(resolve(common), silent)
