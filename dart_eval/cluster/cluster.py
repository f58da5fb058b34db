"""Run all cells of a configuration on Ray: on one machine, several GPUs, a Slurm allocation or a cluster.

A cell is a task of Ray, which finds it a place and repeats it if its process is lost. This process, the driver, claims
cells, and alone writes what they return; so no disk has to be shared. Keys, records and folders are those of any run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dart_eval.cluster.cell import Made, run_cell
from dart_eval.evaluation.unsafe import away_from_this_folder
from dart_eval.results.store import Journal
from dart_eval.sweep.events import Event, Tell
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import Cell
from dart_eval.sweep.run import RunResult, Sweep, begin_sweep
from dart_eval.util.errors import UserError, summary

TRIES = 3  # more, where the process at work on a cell is lost
AHEAD = 256  # cells that Ray has at once: the claim of each is an open file
POLL = 0.5  # seconds between looks: Ray keeps Ctrl-C back while it waits


def run_all(configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False) -> RunResult:
    """See `run.run_all`.

    Raises:
        UserError: the input is wrong, or there is no such cluster. Nothing has been written.
    """
    first = configs[0]
    tell(Event("wait", "connecting to Ray"))
    with _connected(str(first.ray)):
        import ray

        gpus = _gpus(first)
        device, spread = ("cuda", "auto" if gpus > 1 else None) if gpus else ("cpu", None)
        sweep = begin_sweep(configs, tell, skip_missing, device)
        common = dataclasses.replace(first, device=device, device_map=first.device_map or spread)
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES)(run_cell)

        def submit(cell: Cell, journal: Journal) -> object:
            config = dataclasses.replace(cell.config, tasks=(cell.task,))
            return remote.remote(config, cell.key, journal, common, os.getcwd())

        return sweep.work_through(lambda todo: _work(sweep, todo, submit))


def _work(sweep: Sweep, todo: Sequence[Cell], submit: Callable[[Cell, Journal], object]) -> None:
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
                        _take(sweep, cell, journal, ray.get(found))
                    except ray.exceptions.RayError as error:
                        sweep.fail(cell, f"the process at work on it was lost ({summary(error)})", str(error))


def _take(sweep: Sweep, cell: Cell, journal: Journal, made: Made) -> None:
    """Write what came of a cell."""
    if made.record is not None:
        sweep.save(cell, made.record, made.texts, journal)
        return
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
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray would try for minutes where nobody listens
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=10).close()
        with away_from_this_folder():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({error})", "start one (`ray start --head`), or give --ray local"
        ) from None
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
    gpus = config.gpus_per_cell
    if gpus is None:
        gpus = int(config.device == "cuda" or (config.device == "auto" and most > 0))
    if gpus > most:
        raise UserError(
            f"no node of the cluster has {gpus} GPUs for a cell (the largest: {most})",
            "give a smaller --gpus-per-cell, or --device cpu",
        )
    return gpus
