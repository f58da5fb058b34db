"""The worker of an actor: it keeps a model loaded and evaluates cells, or parts of them.

It holds no files: what it answers is told to the driver (`desk`), batch by batch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dart_eval.cluster.actor import Elsewhere
from dart_eval.evaluation.part import Part
from dart_eval.results.journal import Journal
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import Job, Silent, plan_all
from dart_eval.util.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Payload:
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

    def run(self, payload: Payload, tell: Callable[[Any], None]) -> Any:
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

    def __init__(self, payload: Payload, tell: Callable[[Any], None]) -> None:
        super().__init__()
        super().add(payload.answers, payload.state_bytes, 0.0)
        self.seconds = payload.seconds
        self._tell = tell

    def add(self, answers: Any, state_bytes: int, seconds: float) -> None:
        super().add(answers, state_bytes, seconds)
        self._tell((dict(answers), state_bytes, seconds))


def settle(threads: int | None, folder: str) -> None:
    """In an actor: our own lines alone, the driver's folder if it is here, no more threads than were asked for."""
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


def _in_main_thread(stock: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """A function of `signal` that does nothing in other threads.

    lm-eval's math tasks set a time-out by SIGALRM. Python refuses that in a thread, and they take the error for a wrong
    answer; so they get none.
    """

    def call(*args: Any) -> Any:
        return stock(*args) if threading.current_thread() is threading.main_thread() else answer

    return call
