"""Run all cells of a configuration on Ray: on one machine, several GPUs, a Slurm allocation or a cluster.

Actors (`pool`) keep the model loaded and evaluate cells, or parts of large ones (`worker`). They hold no files: every
finished batch travels to this process, the driver, which alone writes journals, records and logs (`driver`). So
nothing has to be shared, and a run goes on where it was, whatever was killed: an actor, a node, the driver. Keys,
records and folders are those of the local executor, and either goes on with what the other began.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dart_eval.cluster.driver import Driver
from dart_eval.cluster.pool import Pool
from dart_eval.cluster.worker import CellWorker
from dart_eval.evaluation.unsafe import away_from_this_folder
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import RunResult, View, begin_sweep
from dart_eval.sweep.plan import methods_of
from dart_eval.util.errors import UserError


def run_all(configs: Sequence[RunConfig], view: View, skip_missing: bool = False) -> RunResult:
    """See `run.run_all`.

    Raises:
        UserError: the input is wrong, or there is no such cluster. Nothing has been written.
    """
    common = configs[0]
    for config in configs:
        config.check()  # before a cluster is asked for
        methods_of(config)
    view.status("connecting to Ray")
    with _connected(common):
        size, options = _room(common)
        view.note(_describe(size, options))
        placed = _placed(common, options)
        sweep = begin_sweep(configs, view, skip_missing, placed.device)
        make = functools.partial(CellWorker, placed, _threads(options), os.getcwd())
        with Driver(sweep, size, common.shards) as driver, Pool(make, size, options) as pool:
            return sweep.work_through(lambda todo: pool.run(driver.tasks(todo), driver))


@contextlib.contextmanager
def _connected(config: RunConfig) -> Iterator[None]:
    """Connect to the cluster, or to one that runs on this machine for the length of the run."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray", "pip install 'dart-eval[ray]'") from None
    if ray.is_initialized():  # the program around us has a cluster
        yield
        return
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if config.ray_address is not None:
            _check_address(config.ray_address)
        own = {"address": "local", "include_dashboard": False, "num_cpus": _processors()}
        with away_from_this_folder():
            ray.init(**(own if config.ray_address is None else {"address": config.ray_address}), **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {config.ray_address} ({error})", "start one (`ray start --head`), see docs/cluster.md"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray has one of its own, which ends without a word
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OSError if nothing listens at the address: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _processors() -> int | None:
    """Return this process's CPUs if they are limited (a Slurm step, taskset), or None: Ray counts them."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return None
    ours = len(os.sched_getaffinity(0))
    return ours if ours < (os.cpu_count() or ours) else None


def _room(config: RunConfig) -> tuple[int, dict[str, float]]:
    """Return how many actors fit, and the resources of each.

    Raises:
        UserError: none does.
    """
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpus = config.gpus_per_cell
    if gpus is None:
        there = any(n.get("GPU", 0) for n in nodes)
        gpus = 1.0 if config.device == "cuda" or (config.device == "auto" and there) else 0.0
    cpus = 1.0 if config.cpus_per_cell is None else config.cpus_per_cell
    fitting = sum(min(_times(cpus, n.get("CPU", 0)), _times(gpus, n.get("GPU", 0))) for n in nodes)
    if not fitting:
        if gpus and not any(n.get("GPU", 0) for n in nodes):
            raise UserError("no node of the cluster has a GPU", "leave --device cuda and --gpus-per-cell out for CPUs")
        most = {kind: max((n.get(kind, 0) for n in nodes), default=0) for kind in ("CPU", "GPU")}
        raise UserError(
            f"no node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs for a cell (the largest: {most['CPU']:g} and "
            f"{most['GPU']:g})",
            "give a smaller --cpus-per-cell or --gpus-per-cell",
        )
    if config.device_map is not None and not gpus:
        raise UserError(
            f"--device-map {config.device_map} needs workers with GPUs, and the cluster's have none",
            "give --gpus-per-cell, or leave --device-map out",
        )
    return fitting, {"num_cpus": cpus, "num_gpus": gpus}


def _times(part: float, whole: float) -> int:
    """Return how often a resource fits; 0.2 five times into 1, which `//` of floats denies."""
    return int(whole / part + 1e-6) if part else 1 << 20


def _describe(size: int, options: dict[str, float]) -> str:
    """Return a line about the workers, for people."""
    each = f"{options['num_cpus']:g} CPU{'s' if options['num_cpus'] != 1 else ''}"
    if gpus := options["num_gpus"]:
        each += f" and {gpus:g} GPU{'s' if gpus != 1 else ''}"
    return f"up to {size} worker{'s' if size != 1 else ''} on {'cuda' if gpus else 'cpu'}, each with {each}"


def _placed(config: RunConfig, options: dict[str, float]) -> RunConfig:
    """Return the configuration for the actor's device; a model with several GPUs is spread over them."""
    gpus = options["num_gpus"]
    device_map = config.device_map or ("auto" if gpus > 1 else None)
    return dataclasses.replace(config, device="cuda" if gpus else "cpu", device_map=device_map)


def _threads(options: dict[str, float]) -> int | None:
    """Return torch's threads in an actor; None: torch's default."""
    return None if options["num_gpus"] else max(1, int(options["num_cpus"]))
