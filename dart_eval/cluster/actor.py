"""An actor of Ray: it makes one worker, and runs one task after another in a thread of its own. It knows no pool.

The driver asks it again and again what is new (`Actor.poll`), and may stop a task between two of its messages.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from dart_eval.util.errors import UserError, out_of_memory, summary

POLL = 0.5  # seconds that an actor waits for something to tell


class Stopped(Exception):
    """The driver wants this task to end here."""


class Elsewhere(UserError):
    """This node cannot do it (it lacks the model, the data, a version); another one may."""

    @classmethod
    def here(cls, error: UserError) -> Elsewhere:
        """What is wrong on this node, with its name."""
        return cls(f"{error.problem} (on {socket.gethostname()})", error.remedy)


class Worker(Protocol):
    """What an actor runs: made once, then one task after another."""

    def run(self, payload: Any, tell: Callable[[Any], None]) -> Any:
        """Work on a task; `tell` sends a message to the driver, and raises `Stopped` if it wants no more."""


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

    def start(self, payload: Any) -> list[tuple[str, Any]]:
        """Begin a task; the actor must have none. Returns no news yet."""
        self._stop.clear()
        threading.Thread(target=self._work, args=(payload,), daemon=True).start()
        return []

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
                try:
                    self._worker = self._make()
                except UserError as error:
                    raise Elsewhere.here(error) from error
            self._news.put(("done", self._worker.run(payload, self._tell)))
        except Stopped:
            self._news.put(("stopped", None))
        except BaseException as error:
            elsewhere, memory = isinstance(error, Elsewhere), out_of_memory(error)
            final = isinstance(error, UserError) and not elsewhere  # trying again would not help
            what = (summary(error), "".join(traceback.format_exception(error)), final, elsewhere, memory)
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
