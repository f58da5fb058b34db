"""A pool of Ray actors that work through tasks, whatever becomes of the actors. It knows no cells.

Each actor has one worker, made where the actor lives, and works on one task at a time in a thread of its own; the
driver asks every actor again and again what is new (`Actor.poll`). So a task's messages reach the driver one by one, an
actor can be told to stop between two of them, and one that died shows at the next question.

Placement is Ray's: actors that find no room wait in its queue, and get tasks once they have begun. A task whose actor
died, or that failed, goes to the end of the queue, `TRIES` times in all. The last try, and any after memory ran out,
runs with no other task beside it; and where the system killed its process for memory, or its process was lost a second
time (the kernel kills without a reason), at a smaller size, `Task.shrink`.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dart_eval.errors import UserError, out_of_memory, summary

TRIES = 3
POLL = 0.5  # seconds that an actor waits for something to tell
DRAIN = 60.0  # seconds that actors get to finish a batch when the run is stopped


class Stopped(Exception):
    """The driver wants this task to end here."""


class Worker(Protocol):
    """What an actor runs: made once, then one task after another."""

    def run(self, payload: Any, tell: Callable[[Any], None]) -> Any:
        """Work on a task; `tell` sends a message to the driver, and raises `Stopped` if it wants no more."""


@dataclass
class Task:
    """One piece of work.

    Attributes:
        name: for people. tries: begun so far. alone: no other task may run beside it.
        shrink: how often what it needs at a time is to be halved; the handler's payload says so to the worker.
    """

    name: str
    tries: int = 0
    alone: bool = False
    lost: int = 0  # processes that died at it
    shrink: int = 0


class Handler(Protocol):
    """What the driver makes of a pool's work."""

    def begin(self, task: Any) -> Any:
        """The payload of a task that is about to start; None: there is nothing to do any more."""

    def told(self, task: Any, message: Any) -> None:
        """A message from a task under way."""

    def done(self, task: Any, result: Any) -> Iterable[Any]:
        """A task has ended; returns tasks that can begin now."""

    def failed(self, task: Any, problem: str, text: str) -> None:
        """A task has failed for good. problem: one line; text: the traceback, or what is known."""

    def lost(self, number: int, task: Any, problem: str) -> None:
        """An actor is no more, with the task it was at (None: it had none), which may begin again."""

    def log(self, number: int, text: str) -> None:
        """A line of an actor's log."""


class Actor:
    """Runs on a node of the cluster.

    Args:
        make: makes the worker, there.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self._worker: Worker | None = None
        self._news: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        handler = _Lines(self._news)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger("dart_eval").addHandler(handler)

    def where(self) -> str:
        """Node and process, for the log; answers once the actor has begun."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def start(self, payload: Any) -> None:
        """Begin a task; the actor must have none."""
        self._stop.clear()
        threading.Thread(target=self._work, args=(payload,), daemon=True).start()

    def poll(self) -> list[tuple[str, Any]]:
        """What is new: (`told`, message), (`log`, line), and at the end (`done`, result) or (`failed`, ...)."""
        news = []
        try:
            news.append(self._news.get(timeout=POLL))
            while True:
                news.append(self._news.get_nowait())
        except queue.Empty:
            return news

    def stop(self) -> None:
        """End the task at its next message."""
        self._stop.set()

    def _work(self, payload: Any) -> None:
        try:
            if self._worker is None:
                self._worker = self._make()
            self._news.put(("done", self._worker.run(payload, self._tell)))
        except Stopped:
            self._news.put(("stopped", None))
        except BaseException as error:
            lost = isinstance(error, UserError)  # trying again would not help
            what = (summary(error), "".join(traceback.format_exception(error)), lost, out_of_memory(error))
            self._news.put(("failed", what))

    def _tell(self, message: Any) -> None:
        self._news.put(("told", message))
        if self._stop.is_set():
            raise Stopped


class _Lines(logging.Handler):
    """Log records as news."""

    def __init__(self, news: queue.Queue[tuple[str, Any]]) -> None:
        super().__init__(logging.INFO)
        self._news = news

    def emit(self, record: logging.LogRecord) -> None:
        self._news.put(("log", self.format(record)))


@dataclass
class _Hand:
    """An actor as the driver knows it."""

    number: int
    actor: Any
    asked: Any  # reference to what it was asked last, while it has not answered
    ready: bool = False
    task: Any = None
    news: deque[tuple[str, Any]] = field(default_factory=deque)  # heard, and not yet taken in


class Pool:
    """Runs tasks on actors.

    Args:
        make: makes a worker, on the node of its actor.
        size: actors at once. options: what each needs, as Ray's actor options (`num_cpus`, `num_gpus`).
    """

    def __init__(self, make: Callable[[], Worker], size: int, options: dict[str, Any]) -> None:
        self.make, self.size, self.options = make, size, options
        self.deaths = 0
        self._hands: list[_Hand] = []
        self._started = 0

    def run(self, tasks: Iterable[Task], handler: Handler) -> None:
        """Work through all tasks. On an exception (Ctrl-C, a full disk) the actors finish their batches and end."""
        import ray

        waiting: deque[Task] = deque(tasks)
        alone: deque[Task] = deque()
        try:
            while waiting or alone or any(h.task for h in self._hands):
                self._deal(waiting, alone, handler)
                asked = {h.asked: h for h in self._hands if h.asked is not None}
                if not asked:  # all that was left turned out to be done
                    continue
                ray.wait(list(asked), timeout=10 * POLL)  # for one of them
                ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
                for ref in ready:
                    for task in self._hear(asked[ref], handler):
                        if task.alone:
                            alone.append(task)
                        elif task.tries:
                            waiting.append(task)
                        else:  # it ends what has been begun
                            waiting.appendleft(task)
        except BaseException:
            self._drain(handler)
            raise
        finally:
            for hand in self._hands:
                ray.kill(hand.actor)
            self._hands.clear()

    def _deal(self, waiting: deque[Task], alone: deque[Task], handler: Handler) -> None:
        """Give tasks to actors that have none, and make actors where there are tasks for them."""
        busy = [h for h in self._hands if h.task is not None]
        if any(h.task.alone for h in busy):
            return
        for source in (waiting, alone):
            while source and not (source is alone and (busy or waiting)):
                idle = next((h for h in self._hands if h.ready and h.task is None), None)
                if idle is None:
                    if len(self._hands) < min(self.size, len(busy) + len(source)):
                        self._hire(handler)
                        continue
                    break
                task = source.popleft()
                payload = handler.begin(task)
                if payload is None:
                    continue
                task.tries += 1
                idle.task = task
                busy.append(idle)
                handler.log(idle.number, f"{task.name} begins")
                idle.actor.start.remote(payload)
                idle.asked = idle.actor.poll.remote()
                if task.alone:
                    return

    def _hire(self, handler: Handler) -> None:
        import ray

        self._started += 1
        actor: Any = ray.remote(Actor).options(**self.options).remote(self.make)
        self._hands.append(_Hand(self._started, actor, actor.where.remote()))
        handler.log(self._started, "asked for")

    def _hear(self, hand: _Hand, handler: Handler) -> list[Task]:
        """Take in what an actor says; returns tasks that can begin, some of them again."""
        import ray

        try:
            news = ray.get(hand.asked)
        except ray.exceptions.RayError as error:  # the actor is no more, or could not begin
            return self._buried(hand, error, handler)
        hand.asked = None  # an idle actor is not asked: it would begin its next task the later
        if not hand.ready:
            hand.ready = True
            handler.log(hand.number, f"runs on {news}")
            return []
        more: list[Task] = []
        hand.news.extend(news)
        while hand.news:
            kind, what = hand.news.popleft()
            task = hand.task
            if kind == "log":
                handler.log(hand.number, what)
            elif kind == "told":
                handler.told(task, what)
            elif kind == "done":
                hand.task = None
                handler.log(hand.number, f"{task.name} is done")
                more += handler.done(task, what)
            elif kind == "stopped":
                hand.task = None
            elif kind == "failed":
                hand.task = None
                problem, text, lost, memory = what
                handler.log(hand.number, f"{task.name} failed: {text}")
                task.alone = task.alone or memory
                more += self._again(task, problem, text, lost, handler)
        if hand.task is not None:
            hand.asked = hand.actor.poll.remote()
        return more

    def _buried(self, hand: _Hand, error: Exception, handler: Handler) -> list[Task]:
        import ray

        self._hands.remove(hand)
        self.deaths += 1
        handler.log(hand.number, f"is lost: {error}")
        task = hand.task
        handler.lost(hand.number, task, summary(error))
        if task is None:
            if self.deaths > TRIES * self.size:  # they cannot even begin
                raise UserError(f"actors die before they begin ({summary(error)})", "see the logs of Ray")
            return []
        task.lost += 1
        memory = isinstance(error, ray.exceptions.OutOfMemoryError)
        task.alone = task.alone or memory
        task.shrink += memory or task.lost > 1
        return self._again(task, f"the process at work on it was lost ({summary(error)})", str(error), False, handler)

    def _again(self, task: Task, problem: str, text: str, lost: bool, handler: Handler) -> list[Task]:
        if lost or task.tries >= TRIES:
            handler.failed(task, f"{problem} (tried {task.tries} times)" if task.tries > 1 else problem, text)
            return []
        task.alone = task.alone or task.tries == TRIES - 1
        return [task]

    def _drain(self, handler: Handler) -> None:
        """Let actors finish the batch that they are at, and take in what they made."""
        import ray

        busy = [h for h in self._hands if h.task is not None]
        for hand in busy:
            hand.actor.stop.remote()
        end = time.monotonic() + DRAIN
        while busy and time.monotonic() < end:
            for hand in busy:
                while hand.news:
                    kind, what = hand.news.popleft()
                    if kind == "told":
                        handler.told(hand.task, what)
                    elif kind in ("done", "stopped", "failed"):
                        hand.task = None
            busy = [h for h in busy if h.task is not None]
            for hand in busy:
                hand.asked = hand.asked or hand.actor.poll.remote()
            ready, _ = ray.wait([h.asked for h in busy], timeout=POLL) if busy else ([], [])
            for hand in [h for h in busy if h.asked in ready]:
                try:
                    hand.news.extend(ray.get(hand.asked))
                except ray.exceptions.RayError:
                    hand.task = None
                hand.asked = None
