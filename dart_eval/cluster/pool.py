"""A pool of Ray actors that work through tasks, whatever becomes of the actors. It knows no cells.

Each actor has one worker, made where the actor lives, and works on one task at a time in a thread of its own; the
driver asks every actor again and again what is new (`Actor.poll`). So a task's messages reach the driver one by one, an
actor can be told to stop between two of them, and one that died shows at the next question.

Placement is Ray's: actors that find no room wait in its queue, and get tasks once they have begun. A task whose actor
died, or that failed, goes to the end of the queue, up to `TRIES` tries that brought nothing new. The last of them, and
any after memory ran out, runs alone: with no other actor that holds memory. Where the system killed its process for
memory, or its process was lost a second time (the kernel kills without a reason), it runs at a smaller size,
`Task.shrink`. An actor in which a task has failed is replaced: what the failure left in its process is not known.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dart_eval.cluster.actor import POLL, Actor, Worker
from dart_eval.util.errors import UserError, summary

TRIES = 3
DRAIN = 60.0  # seconds that actors get to finish a batch when the run is stopped
PATIENCE = 60.0  # seconds without any actor before people are told


@dataclass
class Task:
    """One piece of work.

    Attributes:
        name: for people.
        alone: no other actor may be there while it runs.
        tries: how often it was begun since it last brought something new.
        lost: how often its process died since then.
        shrink: how often what it needs at a time is to be halved; the handler's payload says so to the worker.
        follows: it ends what has been begun, and goes before what has not.
    """

    name: str
    alone: bool = False
    tries: int = 0
    lost: int = 0
    shrink: int = 0
    follows: bool = False


class Handler(Protocol):
    """What the driver makes of a pool's work."""

    def begin(self, task: Any) -> Any:
        """The payload of a task that is about to start; None: there is nothing to do any more."""

    def told(self, task: Any, message: Any) -> bool:
        """A message from a task under way; returns whether another try would begin after what it brought."""

    def done(self, task: Any, result: Any) -> Iterable[Any]:
        """A task has ended; returns tasks that can begin now."""

    def failed(self, task: Any, problem: str, text: str) -> None:
        """A task has failed for good. problem: one line; text: the traceback, or what is known."""

    def lost(self, number: int, task: Any, problem: str) -> None:
        """An actor is no more, with the task it was at (None: it had none), which may begin again."""

    def stopping(self) -> None:
        """The run is to end; actors finish the batch that they are at."""

    def unstaffed(self, seconds: float) -> None:
        """There has been no actor for so long, and nothing else will be heard until there is one."""

    def log(self, number: int, text: str) -> None:
        """A line of an actor's log."""


@dataclass
class _Hand:
    """An actor as the driver knows it."""

    number: int
    actor: Any
    asked: Any  # reference to what it was asked last, while it has not answered
    introduced: bool = False  # where it runs is in its log
    present: bool = False  # it has just answered, and waits for a task
    task: Any = None
    news: deque[tuple[str, Any]] = field(default_factory=deque)  # heard, and not yet taken in


class Pool:
    """Runs tasks on actors.

    Args:
        make: makes a worker, on the node of its actor.
        size: actors at once.
        options: what each needs, as Ray's actor options (`num_cpus`, `num_gpus`).
    """

    def __init__(self, make: Callable[[], Worker], size: int, options: dict[str, Any]) -> None:
        self.make, self.size, self.options = make, size, options
        self.deaths = 0
        self._stillborn = 0  # actors that died without a task, since one was begun
        self._hands: list[_Hand] = []
        self._started = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for hand in list(self._hands):
            self._dismiss(hand)

    def run(self, tasks: Iterable[Task], handler: Handler) -> None:
        """Work through all tasks; the actors stay. On an exception (Ctrl-C, a full disk) they finish their batches.

        Raises:
            UserError: there will be no actors any more.
        """
        import ray

        waiting: deque[Task] = deque(tasks)
        alone: deque[Task] = deque()
        heard, told = time.monotonic(), False
        try:
            while True:
                self._deal(waiting, alone, handler)
                if not (waiting or alone or any(h.task for h in self._hands)):
                    return
                asked = {h.asked: h for h in self._hands if h.asked is not None}
                ray.wait(list(asked), timeout=10 * POLL)  # for one of them
                ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
                if ready:
                    heard, told = time.monotonic(), False
                else:
                    _check_node()
                    silent = time.monotonic() - heard
                    if silent > PATIENCE and not told and not any(h.task for h in self._hands):
                        told = True
                        handler.unstaffed(silent)
                for ref in ready:
                    for task in self._hear(asked[ref], handler):
                        if task.alone:
                            alone.append(task)
                        elif task.follows:
                            waiting.appendleft(task)
                        else:
                            waiting.append(task)
        except BaseException:
            self._drain(handler)
            raise

    def _dismiss(self, hand: _Hand) -> None:
        import ray

        self._hands.remove(hand)
        ray.kill(hand.actor)

    def _deal(self, waiting: deque[Task], alone: deque[Task], handler: Handler) -> None:
        """Give tasks to actors that have none, and make actors where there are tasks for them."""
        busy = [h for h in self._hands if h.task is not None]
        if any(h.task.alone for h in busy):
            return
        for source in (waiting, alone):
            while source and not (source is alone and (busy or waiting)):
                hand = next((h for h in self._hands if h.present), None)
                if hand is None:
                    break
                task = source.popleft()
                payload = handler.begin(task)
                if payload is None:
                    continue
                task.tries += 1
                self._stillborn = 0
                hand.task, hand.present = task, False
                busy.append(hand)
                if task.alone:
                    for other in [h for h in self._hands if h is not hand]:  # they hold memory
                        self._dismiss(other)
                handler.log(hand.number, f"{task.name} begins")
                hand.asked = hand.actor.start.remote(payload)
                if task.alone:
                    return
        self._call(len(waiting) or int(bool(alone and not busy)), len(busy), handler)

    def _call(self, tasks: int, busy: int, handler: Handler) -> None:
        """Ask idle actors whether they are there: one may have died meanwhile, and no task is to try it out."""
        for hand in [h for h in self._hands if h.task is None]:
            hand.present = False
            if tasks:
                hand.asked = hand.asked or hand.actor.where.remote()
        while len(self._hands) < min(self.size, busy + tasks):
            self._hire(handler)

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
        if hand.task is None:
            hand.present = True
            if not hand.introduced:
                handler.log(hand.number, f"runs on {news}")
            hand.introduced = True
            return []
        more: list[Task] = []
        hand.news.extend(news)
        while hand.news:
            kind, what = hand.news.popleft()
            task = hand.task
            if kind == "log":
                handler.log(hand.number, what)
            elif kind == "told":
                if handler.told(task, what):
                    task.tries, task.lost = 1, 0
            elif kind == "done":
                hand.task = None
                handler.log(hand.number, f"{task.name} is done")
                more += handler.done(task, what)
            elif kind == "stopped":
                hand.task = None
            elif kind == "failed":
                hand.task = None
                problem, text, final, elsewhere, memory = what
                handler.log(hand.number, f"{task.name} failed: {text}")
                task.alone = task.alone or memory
                more += self._again(task, problem, text, handler, final, elsewhere)
                if not final:
                    self._dismiss(hand)
        if hand.task is not None:
            hand.asked = hand.actor.poll.remote()
        return more

    def _buried(self, hand: _Hand, error: Exception, handler: Handler) -> list[Task]:
        import ray

        self._dismiss(hand)  # it may live, and only its news cannot be had
        self.deaths += 1
        handler.log(hand.number, f"is lost: {error}")
        task = hand.task
        why = _why(error)
        handler.lost(hand.number, task, why)
        if task is not None and isinstance(error, ray.exceptions.RayTaskError):  # it could not take the task in
            return self._again(task, summary(error), str(error), handler)
        if task is None:
            self._stillborn += 1
            if self._stillborn > TRIES * self.size:
                raise UserError(f"actors die before they begin ({why})", "see the logs of Ray")
            return []
        task.lost += 1
        memory = isinstance(error, ray.exceptions.OutOfMemoryError)
        task.alone = task.alone or memory
        task.shrink += memory or task.lost > 1
        return self._again(task, f"the process at work on it was lost ({why})", str(error), handler)

    def _again(
        self, task: Task, problem: str, text: str, handler: Handler, final: bool = False, elsewhere: bool = False
    ) -> list[Task]:
        if final or task.tries >= TRIES:
            handler.failed(task, f"{problem} (tried {task.tries} times)" if task.tries > 1 else problem, text)
            return []
        task.alone = task.alone or (task.tries == TRIES - 1 and not elsewhere)
        return [task]

    def _drain(self, handler: Handler) -> None:
        """Let actors finish the batch that they are at, and take in what they made."""
        import ray

        busy = [h for h in self._hands if h.task is not None]
        if busy:
            handler.stopping()
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


def _why(error: Exception) -> str:
    """What Ray says of the end of an actor in one line, without its numbers for it and without guesses."""
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("\t"))
    return f"{type(error).__name__}: {text.partition(' Some common causes')[0][:300]}"


def _check_node() -> None:
    """Ray takes a process whose node is gone for dead: its actors end, and it waits for others for ever."""
    import ray

    ours = ray.get_runtime_context().get_node_id()
    if not any(node["NodeID"] == ours and node["Alive"] for node in ray.nodes()):
        raise UserError(
            "the Ray node that this process belongs to is lost, and with it all workers",
            "start Ray again if it was yours; the same command goes on from here",
        )
