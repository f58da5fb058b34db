"""Several processes on this machine share the cells of a run: `--workers N`.

Each is a run of its own (`local`) that claims one cell after another and keeps the model loaded, on a GPU of its own or
on its share of the processors. It reports to this process, which alone shows anything. A worker that dies leaves
its cell to the next one, with every batch that was finished. A cell at which workers died `TRIES` times has failed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dart_eval.results.record import Record
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import Job, RunResult, Sweep, View, begin_sweep, made_anew
from dart_eval.sweep.plan import Cell
from dart_eval.util.errors import UserError, writing

TRIES = 3
# An empty entry of the path is the working directory, which nothing is imported from.
BEGIN = "import sys; sys.path[:] = filter(None, sys.path); from dart_eval.sweep.workers import serve; serve()"


@dataclass
class _Worker:
    """A process: its place among the workers, which decides its GPU, and its present cell."""

    place: int
    process: subprocess.Popen[bytes]
    at: Cell | None = None


def run_all(configs: Sequence[RunConfig], view: View, skip_missing: bool = False) -> RunResult:
    """See `cluster.run.run_all`.

    Raises:
        UserError: the input is wrong, or workers die before they begin a cell.
    """
    sweep = begin_sweep(configs, view, skip_missing)
    with _Workers(sweep, configs, skip_missing) as workers:
        return sweep.work_through(workers.run)


class _Workers:
    """The workers of a run, and what they report."""

    def __init__(self, sweep: Sweep, configs: Sequence[RunConfig], skip_missing: bool) -> None:
        self.sweep, self.asked = sweep, (configs, skip_missing, time.time())
        self.heard: queue.Queue[tuple[_Worker, tuple[str, tuple[Any, ...]] | None]] = queue.Queue()
        self.workers: dict[int, _Worker] = {}
        self.deaths: Counter[str] = Counter()
        self.count, self.cards = configs[0].workers, _cards(configs[0])
        self.notes: set[str] = set()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.process.terminate()
        for worker in self.workers.values():
            worker.process.wait()

    def run(self, todo: list[Job]) -> None:
        """Work until no worker is left: each ends once there is no cell for it."""
        for place in range(min(self.count, len(todo))):
            self._begin(place)
        while self.workers:
            worker, message = self.heard.get()
            if message is None:
                self._ended(worker)
            else:
                self._take(worker, *message)
        self._elsewhere()

    def _elsewhere(self) -> None:
        """Take over what other runs have ended meanwhile: no worker has reported it."""
        (_, _, begun), store = self.asked, self.sweep.store
        for job in [*self.sweep.todo]:
            cell = job.cell
            if not made_anew(store, job, begun) and (record := store.get(cell.name, cell.key)) is not None:
                self.sweep.done[cell.key] = record
                self.sweep.view.finished(cell, record)
            elif store.written_since("failed", cell.name, cell.key, begun):
                self.sweep.failed.append(cell)
                self.sweep.view.note(f"{cell.title} has failed in another run")

    def _begin(self, place: int) -> None:
        """Start the worker of a place, which decides its GPU."""
        log = self._log(place)
        threads = max(1, len(os.sched_getaffinity(0)) // self.count) if hasattr(os, "sched_getaffinity") else 1
        card = {"CUDA_VISIBLE_DEVICES": self.cards[place % len(self.cards)]} if self.cards else {}
        settings = {} if self.cards else {"OMP_NUM_THREADS": str(threads)}
        with writing(self.sweep.store.folder):
            log.parent.mkdir(parents=True, exist_ok=True)
            opened = log.open("ab")
        with opened as file:
            process = subprocess.Popen(
                [sys.executable, "-c", BEGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                env={**os.environ, **card, **settings},
            )  # fmt: skip
        worker = self.workers[place] = _Worker(place, process)
        assert process.stdin is not None
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # it died; the thread that listens says so
            pickle.dump(self.asked, process.stdin)
            process.stdin.close()

    def _log(self, place: int) -> Path:
        return self.sweep.store.folder / "logs" / f"worker-{place + 1}.log"

    def _listen(self, worker: _Worker) -> None:
        """Pass on what a worker reports, in a thread; None once it has ended."""
        assert worker.process.stdout is not None
        while True:
            try:
                self.heard.put((worker, pickle.load(worker.process.stdout)))
            except Exception as error:
                if not isinstance(error, EOFError):  # broken: it would write on, and nobody would read
                    worker.process.kill()
                self.heard.put((worker, None))
                return

    def _take(self, worker: _Worker, what: str, arguments: tuple[Any, ...]) -> None:
        """Show what a worker reports, and note what it has finished."""
        if what == "refused":
            raise UserError(*arguments)
        view, sweep = self.sweep.view, self.sweep
        if what == "started":
            worker.at = arguments[0]
            self.deaths.pop("", None)  # workers do begin here
        elif what == "finished":
            cell, worker.at = arguments[0], None
            if cell.key not in sweep.jobs:
                raise UserError(
                    f"a worker has run another cell of {cell.task} than was planned",
                    "its documents or the code have changed meanwhile; run it without --workers",
                )
            record = sweep.store.get(cell.name, cell.key)
            if record is None or cell.key in sweep.done:
                return
            sweep.done[cell.key] = record
            arguments = cell, record
        elif what == "note":
            if arguments[0] in self.notes:
                return
            self.notes.add(arguments[0])
        elif what == "failed":
            sweep.failed.append(arguments[0])
            worker.at = None
        getattr(view, what)(*arguments)

    def _ended(self, worker: _Worker) -> None:
        """Replace a worker that died, if cells are left."""
        del self.workers[worker.place]
        status, cell = worker.process.wait(), worker.at
        if not status:
            return
        log = self._log(worker.place)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        at = f" at {cell.title}" if cell else ""
        self.sweep.view.note(f"worker {worker.place + 1} died{at} ({how}); see {log}")
        if cell is None and not self.sweep.todo:
            return
        name = cell.key if cell else ""
        self.deaths[name] += 1
        if self.deaths[name] >= TRIES:
            problem = f"the process at work on it died {TRIES} times ({how})"
            if cell is None:
                raise UserError(f"workers died before their first cell ({how})", f"see {log}")
            self.sweep.failed.append(cell)
            self.sweep.view.failed(cell, problem, self.sweep.store.failed(cell.name, cell.key, problem))
        if self.sweep.todo:
            self._begin(worker.place)


def _cards(config: RunConfig) -> list[str]:
    """Return the GPUs that workers may use, as `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    from dart_eval.models.device import choose_device

    if choose_device("auto" if config.device_map else config.device).type != "cuda":
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def serve() -> None:
    """Run the sweep that comes on stdin, in a worker, and report on stdout."""
    from dart_eval.sweep import local
    from dart_eval.util.quiet import silence

    out, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr  # what libraries print goes into the log
    os.dup2(2, 1)  # and so does what those in C print
    silence()
    configs, skip_missing, begun = pickle.load(sys.stdin.buffer)
    report = _Report(out)
    try:
        local.run_all(configs, report, skip_missing, since=begun)
    except UserError as error:
        report.refused(error.problem, error.remedy)


class _Report:
    """A view that passes on what it is shown: `started`, `advanced`, `finished` ... with their arguments."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._lock, self._begun = out, threading.Lock(), False

    def __getattr__(self, what: str) -> Callable[..., None]:
        def report(*arguments: object) -> None:
            of_plan = what in ("about", "planned", "status") or (what == "note" and not self._begun)
            self._begun = self._begun or what == "planned"
            if of_plan:  # which stands
                return
            sent = tuple(a for a in arguments if not isinstance(a, Record))  # the folder has it
            with self._lock:
                try:
                    pickle.dump((what, sent), self._out)
                    self._out.flush()
                except BrokenPipeError:  # the run was killed: its cell has not failed, and another run goes on with it
                    raise SystemExit(1) from None

        return report
