"""Run all cells of a configuration on Ray: one machine, several GPUs, a Slurm allocation, a cluster.

Actors keep the model loaded and evaluate cells, or parts of large ones (`pool`). They hold no files: every finished
batch travels to this process, the driver, which alone writes journals, records and logs. So nothing has to be shared,
and a run goes on where it was, whatever was killed: an actor, a node, the driver. Keys, records and folders are those
of the local executor, and either goes on with what the other began.

A large cell is split by its batches: part i of n runs every n-th one. A batch is the same whatever runs beside it, so
the parts' answers together are those of the whole cell; the last step makes the record of them and asks nothing more.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_eval.errors import StoreError, UserError, summary
from dart_eval.evaluation.evaluate import count_requests
from dart_eval.evaluation.part import WHOLE, Part
from dart_eval.evaluation.unsafe import away_from_this_folder
from dart_eval.executors.jobs import Job, RunResult, Silent, Sweep, View, begin_sweep, open_cell, plan_all
from dart_eval.executors.pool import POLL, Elsewhere, Pool, Task
from dart_eval.plan import RunConfig, methods_of
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.results.store import Store

if TYPE_CHECKING:
    from dart_eval.executors.sizing import CellSize

log = logging.getLogger(__name__)
PART_REQUESTS = 512  # that a part of a cell has at least, unless the user wants so many parts


def run_all(configs: Sequence[RunConfig], view: View, skip_missing: bool = False) -> RunResult:
    """See `executors.run_all`.

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
        view.note(_staff(size, options))
        placed = _placed(common, options)
        sweep = begin_sweep(configs, view, skip_missing, placed.device)
        make = functools.partial(CellWorker, placed, _threads(options), os.getcwd())
        with _Desk(sweep, size, common.shards) as desk, Pool(make, size, options) as pool:
            return sweep.work_through(lambda todo: pool.run(desk.tasks(todo), desk))


@contextlib.contextmanager
def _connected(config: RunConfig) -> Iterator[None]:
    """A connection to the cluster, or to one on this machine for the time of the run."""
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
            _knock(config.ray_address)
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


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _processors() -> int | None:
    """Those that this process may use, where they are not all (a Slurm step, taskset); None: Ray counts them."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return None
    ours = len(os.sched_getaffinity(0))
    return ours if ours < (os.cpu_count() or ours) else None


def _room(config: RunConfig) -> tuple[int, dict[str, float]]:
    """How many actors fit, and what each takes.

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
    fitting = sum(int(min(n.get("CPU", 0) // cpus, n.get("GPU", 0) // gpus if gpus else 1 << 20)) for n in nodes)
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


def _staff(size: int, options: dict[str, float]) -> str:
    """Who will work, for people."""
    each = f"{options['num_cpus']:g} CPU{'s' if options['num_cpus'] != 1 else ''}"
    if gpus := options["num_gpus"]:
        each += f" and {gpus:g} GPU{'s' if gpus != 1 else ''}"
    return f"up to {size} worker{'s' if size != 1 else ''} on {'cuda' if gpus else 'cpu'}, each with {each}"


def _placed(config: RunConfig, options: dict[str, float]) -> RunConfig:
    """The configuration where it runs; a model that has several GPUs is spread over them."""
    gpus = options["num_gpus"]
    device_map = config.device_map or ("auto" if gpus > 1 else None)
    return dataclasses.replace(config, device="cuda" if gpus else "cpu", device_map=device_map)


def _threads(options: dict[str, float]) -> int | None:
    """Torch's threads in an actor; None: its own number."""
    return None if options["num_gpus"] else max(1, int(options["num_cpus"]))


def estimate_all(configs: Sequence[RunConfig], view: View) -> tuple[list[CellSize], int]:
    """`sizing.estimate` on a node of the cluster, and how many workers there would be.

    Raises:
        UserError: the input is wrong, or there is no such cluster.
    """
    view.status("connecting to Ray")
    with _connected(configs[0]):
        import ray

        size, options = _room(configs[0])
        view.status("trying a few batches of every task")
        tried: Any = ray.remote(_estimate).options(max_retries=0, **options)
        placed = [_placed(c, options) for c in configs]
        try:
            found = tried.remote(placed, _threads(options), os.getcwd())
            while not ray.wait([found], timeout=POLL)[0]:  # not for long at a time: Ray would keep Ctrl-C back
                pass
            sizes: list[CellSize] = ray.get(found)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the worker that tried a few batches was lost ({summary(error)})", "perhaps a smaller --batch-size"
            ) from None
    store = Store(configs[0].output)  # here: the node may not see it
    return [dataclasses.replace(s, finished=store.get(s.name, s.key) is not None) for s in sizes], size


# -- in the actors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Payload:
    """A cell or a part of it, with what has been answered of it."""

    key: str
    config: RunConfig  # of this cell's task alone
    part: Part
    answers: dict[str, Any]
    state_bytes: int
    seconds: float
    shrink: int  # how often batches are to be halved from the start


class CellWorker:
    """A `worker.Worker` in an actor: it keeps the model, and what it has planned.

    Args:
        threads: of torch; None leaves its own number. folder: the driver's, from which relative paths count.
    """

    def __init__(self, config: RunConfig, threads: int | None, folder: str) -> None:
        from dart_eval.executors.worker import Worker
        from dart_eval.models import resolve

        _settle(threads, folder)
        self.device = config.device
        self.model = resolve(config.model_spec)
        self.worker = Worker(config, self.model, log.info, note=log.info)
        self._jobs: dict[RunConfig, dict[str, Job]] = {}

    def run(self, payload: _Payload, tell: Callable[[Any], None]) -> Any:
        """The texts and the record of a cell; of a part, whose answers have been told, how often memory ran out."""
        if payload.config not in self._jobs:
            # Tasks of its own: a run writes into lm-eval's, and their hashes would be others afterwards.
            try:
                jobs, _ = plan_all([payload.config], Silent(), False, self.device, self.model)
            except UserError as error:  # the driver could plan it
                raise Elsewhere.here(error) from error
            self._jobs[payload.config] = jobs
        jobs = self._jobs[payload.config]
        if payload.key not in jobs:
            raise Elsewhere(
                "this node would not evaluate the cell that the driver planned: its code, versions, model or data are "
                "others",
                "install the same versions and give every node the same model and --data-dir",
            )
        journal = _Outbox(payload, tell)
        job = jobs[payload.key]
        if not payload.part.whole:
            self.worker.answer(job, journal, payload.part, payload.shrink)
            return self.worker.halved
        outcome, record = self.worker.run(job, journal, payload.shrink)
        return outcome.texts, record


class _Outbox(Journal):
    """A journal that tells the driver what is added to it."""

    def __init__(self, payload: _Payload, tell: Callable[[Any], None]) -> None:
        super().__init__()
        super().add(payload.answers, payload.state_bytes, 0.0)
        self.seconds = payload.seconds
        self._tell = tell

    def add(self, answers: Any, state_bytes: int, seconds: float) -> None:
        super().add(answers, state_bytes, seconds)
        self._tell((dict(answers), state_bytes, seconds))


def _estimate(configs: list[RunConfig], threads: int | None, folder: str) -> list[CellSize]:
    from dart_eval.executors.sizing import estimate

    _settle(threads, folder)
    return estimate(configs, Silent(), configs[0].device)


def _settle(threads: int | None, folder: str) -> None:
    """In an actor: our own lines alone, the driver's folder if it is here, no more threads than were asked for."""
    import torch

    from dart_eval.quiet import silence

    silence()
    logging.getLogger("dart_eval").setLevel(logging.INFO)
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError):  # where there is no such folder, paths must be absolute
        os.chdir(folder)
    for name, answer in (("signal", signal.SIG_DFL), ("alarm", 0), ("setitimer", (0.0, 0.0))):
        setattr(signal, name, _in_main_thread(getattr(signal, name), answer))


def _in_main_thread(stock: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """A function of `signal` that does nothing in other threads.

    lm-eval's math tasks set a time-out by SIGALRM. Python refuses that in a thread, and they take the error for a wrong
    answer; so they get none.
    """

    def call(*args: Any) -> Any:
        return stock(*args) if threading.current_thread() is threading.main_thread() else answer

    return call


# -- in the driver ---------------------------------------------------------------------------------------------


@dataclass
class _CellTask(Task):
    job: Job = field(kw_only=True)
    part: Part = WHOLE


@dataclass
class _Open:
    """A cell under way."""

    claim: contextlib.ExitStack
    journal: Journal
    left: int  # parts that are not done
    shrink: int = 0  # how often a part's batches had to be halved from the start
    seconds: float = 0.0  # of the actors, since it was opened
    halved: int = 0  # how often memory ran out in parts


class _Desk:
    """The driver's work on a sweep: claims, journals, records, logs.

    Args:
        size: actors at once. shards: parts of every cell; None: as many as are worth it.
    """

    def __init__(self, sweep: Sweep, size: int, shards: int | None) -> None:
        self.sweep, self.store, self.view, self.size, self.shards = sweep, sweep.store, sweep.view, size, shards
        self.logs = sweep.store.folder / "logs"
        self._open: dict[str, _Open] = {}
        self._parts: dict[str, int] = {}
        self._over: set[str] = set()  # cells of which no task is to begin any more
        self._files: dict[Path, Any] = {}
        self._notes: set[str] = set()  # of workers, each shown once

    def __enter__(self) -> _Desk:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._open):
            self._close(key)
        for file in self._files.values():
            file.close()

    def tasks(self, jobs: Sequence[Job]) -> list[_CellTask]:
        """The tasks of cells: one each, or one a part."""
        made = []
        self._over.clear()
        for job in jobs:
            count = self._parts[job.cell.key] = self._count(job)
            for index in range(count):
                name = job.cell.title + (f" part {index + 1} of {count}" if count > 1 else "")
                made.append(_CellTask(name, job=job, part=Part(index, count)))
        return made

    def _count(self, job: Job) -> int:
        """Parts of a cell: as many as there are actors, if each gets enough to do."""
        if self.shards is not None:
            return self.shards
        requests = count_requests(job.tasks.load(job.cell.task), job.config.limit)
        return max(1, min(self.size, requests // PART_REQUESTS))

    def begin(self, task: _CellTask) -> _Payload | None:
        job, cell = task.job, task.job.cell
        if cell.key in self._over:
            return None
        if cell.key not in self._open and not self._claim(job):
            self._over.add(cell.key)
            return None
        opened = self._open[cell.key]
        config = dataclasses.replace(job.config, tasks=(cell.task,))
        journal = opened.journal
        seconds = journal.seconds + opened.seconds
        return _Payload(cell.key, config, task.part, journal.answers(), journal.state_bytes, seconds, task.shrink)

    def _claim(self, job: Job) -> bool:
        """Take a cell up, if nobody else has."""
        cell = job.cell
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(self.store.claim(cell.name, cell.key)):
                return False  # another process is at work on it
            found = open_cell(self.store, job, self.view)
            if isinstance(found, Record):
                self.sweep.done[cell.key] = found
                self.view.finished(cell, found)
                return False
            self._open[cell.key] = _Open(stack.pop_all(), found, self._parts[cell.key])
        self.view.started(cell, count_requests(job.tasks.load(cell.task), job.config.limit))
        return True

    def told(self, task: _CellTask, message: Any) -> bool:
        opened = self._open.get(task.job.cell.key)
        if opened is None:  # another part has failed
            return False
        answers, state_bytes, seconds = message
        opened.journal.add(answers, state_bytes, seconds)
        opened.seconds += seconds
        self.view.advanced(task.job.cell, len(answers))
        return bool(answers)

    def done(self, task: _CellTask, result: Any) -> list[_CellTask]:
        cell = task.job.cell
        opened = self._open.get(cell.key)
        if opened is None:
            return []
        if not task.part.whole:
            opened.left, opened.halved = opened.left - 1, opened.halved + result
            opened.shrink = max(opened.shrink, task.shrink)
            if opened.left:
                return []
            name, small = f"{cell.title}, the whole", opened.shrink
            return [_CellTask(name, alone=small > 0, shrink=small, follows=True, job=task.job)]
        texts, record = result
        if opened.halved:
            halved = record.settings.get("halved", 0) - task.shrink + opened.halved  # the parts have counted those
            record = dataclasses.replace(record, settings={**record.settings, "halved": halved})
        record = self.store.save(cell.name, record, texts)
        opened.journal.remove()
        self._close(cell.key)
        self.sweep.done[cell.key] = record
        self.view.finished(cell, record)
        for text in record.settings.get("notes", []):
            if text not in self._notes:
                self._notes.add(text)
                self.view.note(text)
        return []

    def failed(self, task: _CellTask, problem: str, text: str) -> None:
        cell = task.job.cell
        if cell.key not in self._open:
            return
        self._close(cell.key)
        self._over.add(cell.key)
        self.sweep.failed.append(cell)
        self.view.failed(cell, problem, self.store.failed(cell.name, cell.key, text))

    def lost(self, number: int, task: _CellTask | None, problem: str) -> None:
        at = f" at {task.name}" if task else ""
        self.view.note(f"worker {number} was lost{at} ({problem}); see {self.logs / f'worker-{number}.log'}")

    def stopping(self) -> None:
        self.view.note("stopping: workers finish the batch that they are at")

    def unstaffed(self, seconds: float) -> None:
        self.view.note(
            f"no worker for {seconds:.0f} s: the cluster has no room or no node for one; waiting (`ray status`)"
        )

    def log(self, number: int, text: str) -> None:
        path = self.logs / f"worker-{number}.log"
        try:
            if path not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[path] = path.open("a", encoding="utf-8", buffering=1)
            self._files[path].write(f"{datetime.now().isoformat(timespec='seconds')} {text.rstrip()}\n")
        except OSError as error:
            raise StoreError(self.store.folder, error) from None

    def _close(self, key: str) -> None:
        opened = self._open.pop(key)
        opened.journal.close()
        opened.claim.close()
