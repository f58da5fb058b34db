"""What runs in an actor of Ray: a thread that works on a task, and the messages that it streams to the driver.

`Actor` knows no cells. `CellWorker` keeps a model loaded and evaluates cells, or parts of them. It holds no files:
every batch of answers travels to the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dart_eval.evaluation.shard import Shard
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import Job, Silent, plan_all
from dart_eval.util.errors import UserError, out_of_memory, summary
from dart_eval.util.text import Json

POLL = 0.5  # seconds between looks
log = logging.getLogger(__name__)


class Stopped(Exception):
    """The driver asked to end this task."""


class Elsewhere(UserError):
    """This node cannot run the task (it lacks the model, the data or a version); another may."""

    @classmethod
    def here(cls, error: UserError) -> Elsewhere:
        """Return the error with the name of this node."""
        return cls(f"{error.problem} (on {socket.gethostname()})", error.remedy)


class Worker(Protocol):
    """The worker in an actor: created once, it runs one task after another."""

    def run(self, payload: Any, send: Callable[[object], None]) -> object:
        """Run a task; `send` sends a message to the driver, and raises `Stopped` if the driver ended the task."""


class Actor:
    """An actor with one worker, which runs each task in its own thread.

    Args:
        make: makes the worker, here.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self._worker: Worker | None = None
        self._messages: queue.Queue[tuple[str, object]] = queue.Queue()
        self._stop = threading.Event()
        handler = logging.StreamHandler(self)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger("dart_eval").addHandler(handler)

    def write(self, line: str) -> None:
        """Send a line of the log as a message: the actor is the stream of a log."""
        if line.strip():
            self._messages.put(("log", line))

    def where(self) -> str:
        """Return node and process; answers once the actor has started."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def run(self, payload: object) -> Iterator[tuple[str, object]]:
        """Run a task: yield (`message`, ...) and (`log`, line), at the end (`done`, result), `stopped` or `failed`."""
        self._stop.clear()
        threading.Thread(target=self._work, args=(payload,), daemon=True).start()
        kind = ""
        while kind not in ("done", "stopped", "failed"):
            kind, what = self._messages.get()
            yield kind, what

    def stop(self) -> None:
        """End the task at its next message."""
        self._stop.set()

    def _work(self, payload: object) -> None:
        try:
            if self._worker is None:
                try:
                    self._worker = self._make()
                except UserError as error:
                    raise Elsewhere.here(error) from error
            self._messages.put(("done", self._worker.run(payload, self._send)))
        except Stopped:
            self._messages.put(("stopped", None))
        except BaseException as error:
            elsewhere, memory = isinstance(error, Elsewhere), out_of_memory(error)
            final = isinstance(error, UserError) and not elsewhere  # trying again would not help
            what = (summary(error), "".join(traceback.format_exception(error)), final, elsewhere, memory)
            self._messages.put(("failed", what))

    def _send(self, message: object) -> None:
        self._messages.put(("message", message))
        if self._stop.is_set():
            raise Stopped


@dataclass(frozen=True)
class Payload:
    """A cell or a part of it, with its answers so far. config: with this cell's task only; shrink: see `pool.Task`."""

    key: str
    config: RunConfig
    part: Shard
    answers: Json
    state_bytes: int
    seconds: float
    shrink: int


class CellWorker:
    """A `sweep.worker.Worker` in an actor: it holds the model and the planned cells.

    Args:
        config: of the sweep, where it runs.
        threads: of torch; None leaves its own number.
        folder: the driver's, from which relative paths count.
    """

    def __init__(self, config: RunConfig, threads: int | None, folder: str) -> None:
        from dart_eval.models.loading import resolve
        from dart_eval.sweep.worker import Worker

        settle(threads, folder)
        self.device = config.device
        self.model = resolve(config.model_spec)
        self.worker = Worker(config, self.model, log.info, note=log.info)
        self._jobs: dict[RunConfig, dict[str, Job]] = {}

    def run(self, payload: Payload, send: Callable[[object], None]) -> int | tuple[list[Json], Record]:
        """Return texts and record of a cell, or for a part (which sends its answers) the number of memory errors."""
        if payload.config not in self._jobs:
            # Own copies of the tasks: a run writes into lm-eval's, which would change their hashes.
            try:
                jobs, _ = plan_all([payload.config], Silent(), False, self.device, self.model)
            except UserError as error:  # the driver could plan it
                raise Elsewhere.here(error) from error
            self._jobs[payload.config] = jobs
        if (job := self._jobs[payload.config].get(payload.key)) is None:
            raise Elsewhere(
                "this node would evaluate another cell than the driver planned: its code, versions, model or data "
                "differ",
                "install the same versions and give every node the same model and --data-dir",
            )
        journal = _SentJournal(payload, send)
        if not payload.part.unsharded:
            self.worker.answer(job, journal, payload.part, payload.shrink)
            return self.worker.halved
        outcome, record = self.worker.run(job, journal, payload.shrink)
        return outcome.texts, record


class _SentJournal(Journal):
    """A journal that sends its additions to the driver."""

    def __init__(self, payload: Payload, send: Callable[[object], None]) -> None:
        super().__init__()
        super().add(payload.answers, payload.state_bytes, 0.0)
        self.seconds = payload.seconds
        self._send = send

    def add(self, answers: Json, state_bytes: int, seconds: float) -> None:
        super().add(answers, state_bytes, seconds)
        self._send((dict(answers), state_bytes, seconds))


def settle(threads: int | None, folder: str) -> None:
    """Set up an actor: our own log only, the driver's folder if it exists here, and the requested number of threads."""
    import torch

    from dart_eval.util.quiet import silence

    silence()
    logging.getLogger("dart_eval").setLevel(logging.INFO)
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError):  # where there is no such folder, paths must be absolute
        os.chdir(folder)
    for name, answer in (("signal", signal.SIG_DFL), ("alarm", 0), ("setitimer", (0.0, 0.0))):
        setattr(signal, name, _in_main_thread(getattr(signal, name), answer))


def _in_main_thread(stock: Callable[..., object], answer: object) -> Callable[..., object]:
    """Return a function of `signal` that does nothing in other threads, where Python refuses it.

    lm-eval's math tasks set a time-out by SIGALRM, and would take the error for a wrong answer; so they get none.
    """

    def call(*args: object) -> object:
        return stock(*args) if threading.current_thread() is threading.main_thread() else answer

    return call
