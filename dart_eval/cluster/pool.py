"""A pool of Ray actors that work through tasks even if actors die. It knows no cells.

An actor works on one task at a time and streams its messages (`worker.Actor`). Ray places actors; actors that find no
room wait. A task whose actor died, or that failed, goes to the end of the queue, up to `TRIES` tries that brought
nothing new. The last of them, and any after memory ran out, runs alone: no other actor holds memory. Where the system
killed its process for memory, or its process was lost a second time (the kernel kills without a reason), it runs at a
smaller size, `Task.shrink`. An actor in which a task has failed is replaced: the state of its process is not known.

Ray would restart an actor by itself (`max_restarts`), but then it does not say whether memory was the reason.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dart_eval.cluster.worker import POLL, Actor, Worker
from dart_eval.util.errors import UserError, summary

TRIES = 3
DRAIN = 60.0  # seconds that actors get to finish a batch when the run is stopped
PATIENCE = 60.0  # seconds without any actor before people are told
NOBODY = "no worker for {:.0f} s: the cluster has no room or no node for one; waiting (`ray status`)"


@dataclass
class Task:
    """One piece of work.

    Attributes:
        name: for people.
        alone: no other actor may hold a model while it runs.
        tries: how often it was begun since it last brought something new.
        lost: how often its process died since then.
        shrink: how often batches are to be halved from the start.
        follows: it ends a cell that has begun, and goes before cells that have not.
    """

    name: str
    alone: bool = False
    tries: int = 0
    lost: int = 0
    shrink: int = 0
    follows: bool = False


class Handler(Protocol):
    """The callbacks of a pool."""

    def begin(self, task: Any) -> object:
        """Return the payload of a task that is about to start; None: no work is left."""

    def on_message(self, task: Any, message: Any) -> bool:
        """Take a message of a running task; return whether another try would continue after it."""

    def on_done(self, task: Any, result: Any) -> Iterable[Task]:
        """Take the result of a task; return the tasks that can begin now."""

    def on_failed(self, task: Any, problem: str, text: str) -> None:
        """Handle a task that failed for good. problem: one line. text: the traceback, or Ray's report."""

    def on_death(self, number: int, task: Any, problem: str) -> None:
        """Handle the end of an actor's process; its task (None: it had none) may begin again."""

    def note(self, text: str) -> None:
        """Tell people how the actors fare."""

    def log(self, number: int, text: str) -> None:
        """Write a line of an actor's log."""


@dataclass
class _Handle:
    """An actor as the pool knows it.

    Attributes:
        number: counted over the pool. logged: its node and process are in its log.
        pending: what it was asked last: a ping, or the stream of its task; None.
        ready: it has just answered a ping, and has no task.
    """

    number: int
    actor: Any
    pending: Any = None
    logged: bool = False
    ready: bool = False
    task: Any = None


class Pool:
    """Run tasks on actors.

    Args:
        make: makes a worker, on the node of its actor.
        size: actors at once.
        options: what each needs, as Ray's actor options (`num_cpus`, `num_gpus`).
    """

    def __init__(self, make: Callable[[], Worker], size: int, options: dict[str, float]) -> None:
        self.make, self.size, self.options = make, size, options
        self._early_deaths = 0  # since a task was begun
        self._actors: list[_Handle] = []
        self._numbers = itertools.count(1)
        self._waiting: deque[Task] = deque()
        self._alone: deque[Task] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in [*self._actors]:
            self._dismiss(handle)

    def run(self, tasks: Iterable[Task], handler: Handler) -> None:
        """Work through all tasks; the actors stay. On an exception (Ctrl-C, a full disk) they finish their batches.

        Raises:
            UserError: there will be no actors any more.
        """
        self._waiting, self._alone = deque(tasks), deque()
        heard, told = time.monotonic(), False
        try:
            while True:
                self._dispatch(handler)
                if not (self._waiting or self._alone or self._busy()):
                    return
                if ready := _ready([h for h in self._actors if h.pending is not None], 10 * POLL):
                    heard, told = time.monotonic(), False
                else:
                    _check_node()
                    if (silent := time.monotonic() - heard) > PATIENCE and not (told or self._busy()):
                        told = True
                        handler.note(NOBODY.format(silent))
                for handle in ready:
                    for task in self._receive(handle, handler):
                        queue = self._alone if task.alone else self._waiting
                        (queue.appendleft if task.follows else queue.append)(task)
        except BaseException:
            self._drain(handler)
            raise

    def _busy(self) -> list[_Handle]:
        return [h for h in self._actors if h.task is not None]

    def _dispatch(self, handler: Handler) -> None:
        """Give tasks to actors that are ready, and ping or start actors for the others."""
        for handle in [h for h in self._actors if h.ready]:
            if any(h.task.alone for h in self._busy()) or (found := self._next(handler)) is None:
                break
            (handle.task, payload), handle.ready = found, False
            handle.task.tries, self._early_deaths = handle.task.tries + 1, 0
            handler.log(handle.number, f"{handle.task.name} begins")
            for other in [h for h in self._actors if handle.task.alone and h is not handle]:
                self._dismiss(other)  # it holds a model
            handle.pending = handle.actor.run.options(num_returns="streaming").remote(payload)
        busy = self._busy()
        tasks = 0 if any(h.task.alone for h in busy) else len(self._waiting) or int(bool(self._alone and not busy))
        for handle in [h for h in self._actors if h.task is None]:
            handle.ready = False  # it may end at any time: a task goes to an actor that has just answered
            if tasks and handle.pending is None:
                handle.pending = handle.actor.where.remote()
        while len(self._actors) < min(self.size, len(busy) + tasks):
            self._start(handler)

    def _next(self, handler: Handler) -> tuple[Task, object] | None:
        """Return the next task that may begin, and its payload."""
        while self._waiting or (self._alone and not self._busy()):
            task = (self._waiting or self._alone).popleft()
            if (payload := handler.begin(task)) is not None:
                return task, payload
        return None

    def _start(self, handler: Handler) -> None:
        import ray

        options = {**self.options, "max_concurrency": 2}  # `stop` runs beside a task
        actor: Any = ray.remote(Actor).options(**options).remote(self.make)
        self._actors.append(_Handle(next(self._numbers), actor, actor.where.remote()))
        handler.log(self._actors[-1].number, "asked for")

    def _dismiss(self, handle: _Handle) -> None:
        import ray

        self._actors.remove(handle)
        ray.kill(handle.actor)

    def _receive(self, handle: _Handle, handler: Handler) -> list[Task]:
        """Handle an actor's message; return the tasks that can begin, retries included."""
        import ray

        try:
            if handle.task is None:
                process, handle.pending = ray.get(handle.pending), None
                if not handle.logged:
                    handler.log(handle.number, f"runs on {process}")
                handle.logged = handle.ready = True
                return []
            kind, what = ray.get(next(handle.pending))
        except ray.exceptions.RayError as error:
            return self._died(handle, error, handler)
        task = handle.task
        if kind == "log":
            handler.log(handle.number, what)
        elif kind == "message":
            if handler.on_message(task, what):
                task.tries, task.lost = 1, 0
        else:
            handle.task = handle.pending = None
        if kind == "done":
            handler.log(handle.number, f"{task.name} is done")
            return list(handler.on_done(task, what))
        if kind == "failed":
            problem, text, final, elsewhere, memory = what
            handler.log(handle.number, f"{task.name} failed: {text}")
            task.alone = task.alone or memory
            if not final:
                self._dismiss(handle)
            return self._retry(task, problem, text, handler, final, elsewhere)
        return []

    def _died(self, handle: _Handle, error: Exception, handler: Handler) -> list[Task]:
        """Handle the end of an actor's process, during a task or before its first."""
        import ray

        self._dismiss(handle)  # it may live, and only its messages cannot be had
        task, why = handle.task, _why(error)
        handler.log(handle.number, f"is lost: {error}")
        handler.on_death(handle.number, task, why)
        if task is None:
            self._early_deaths += 1
            if self._early_deaths > TRIES * self.size:
                raise UserError(f"actors die before they begin ({why})", "see the logs of Ray")
            return []
        if isinstance(error, ray.exceptions.RayTaskError):  # it could not take the task in
            return self._retry(task, summary(error), str(error), handler)
        task.lost += 1
        memory = isinstance(error, ray.exceptions.OutOfMemoryError)
        task.alone = task.alone or memory
        task.shrink += memory or task.lost > 1
        return self._retry(task, f"the process at work on it was lost ({why})", str(error), handler)

    def _retry(
        self, task: Task, problem: str, text: str, handler: Handler, final: bool = False, elsewhere: bool = False
    ) -> list[Task]:
        if final or task.tries >= TRIES:
            handler.on_failed(task, f"{problem} (tried {task.tries} times)" if task.tries > 1 else problem, text)
            return []
        task.alone = task.alone or (task.tries == TRIES - 1 and not elsewhere)
        return [task]

    def _drain(self, handler: Handler) -> None:
        """Let actors finish their batches, and collect the results."""
        import ray

        if self._busy():
            handler.note("stopping: workers finish their current batch")
        for handle in self._busy():
            handle.actor.stop.remote()
        end = time.monotonic() + DRAIN
        while (busy := self._busy()) and time.monotonic() < end:
            for handle in _ready(busy, POLL):
                try:
                    kind, what = ray.get(next(handle.pending))
                except ray.exceptions.RayError:
                    kind, what = "lost", None
                if kind == "message":
                    handler.on_message(handle.task, what)
                elif kind != "log":
                    handle.task = None


def _ready(handles: list[_Handle], seconds: float) -> list[_Handle]:
    """Return the actors with a message; wait at most the given seconds for the first."""
    import ray

    pending = [h.pending for h in handles]
    if not pending or not ray.wait(pending, timeout=seconds)[0]:
        return []
    ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
    return [h for h in handles if any(h.pending is r for r in ready)]


def _why(error: Exception) -> str:
    """Return Ray's report of a death as one line, without its numbers and guesses."""
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("\t"))
    return f"{type(error).__name__}: {text.partition(' Some common causes')[0][:300]}"


def _check_node() -> None:
    """Raise UserError if this process's node is lost: Ray ends its actors and waits for others for ever."""
    import ray

    ours = ray.get_runtime_context().get_node_id()
    if not any(node["NodeID"] == ours and node["Alive"] for node in ray.nodes()):
        raise UserError(
            "the Ray node that this process belongs to is lost, and with it all workers",
            "restart Ray if you started it; the same command resumes the run",
        )
