"""The driver of a sweep: it claims cells for the pool, and is the only writer of journals, records and logs.

A large cell is split by its batches: part i of n runs every n-th one. A batch is the same whatever runs beside it, so
the parts' answers together are those of the whole cell; the last step makes the record of them and asks nothing more.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dart_eval.cluster.pool import Task
from dart_eval.cluster.worker import Payload
from dart_eval.evaluation.shard import WHOLE, Shard
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.sweep.jobs import Job, Sweep, count_requests, open_cell
from dart_eval.util.errors import writing
from dart_eval.util.text import Json

PART_REQUESTS = 512  # that a part of a cell has at least, unless the user wants so many parts


@dataclass
class CellTask(Task):
    """A cell or a part of it, as a task of the pool."""

    job: Job = field(kw_only=True)
    part: Shard = WHOLE


@dataclass
class _Open:
    """A claimed cell that is not finished."""

    claim: contextlib.ExitStack
    journal: Journal
    remaining: int  # parts that are not done
    shrink: int = 0  # how often a part's batches had to be halved from the start
    seconds: float = 0.0  # of the actors, since it was opened
    halved: int = 0  # how often memory ran out in parts


class Driver:
    """Claims cells, and writes journals, records and logs.

    Args:
        sweep: what is to be done, and what has been.
        size: actors at once.
        shards: parts of every cell; None: as many as are worth it.
    """

    def __init__(self, sweep: Sweep, size: int, shards: int | None) -> None:
        self.sweep, self.store, self.view, self.size, self.shards = sweep, sweep.store, sweep.view, size, shards
        self.logs = sweep.store.folder / "logs"
        self._open: dict[str, _Open] = {}
        self._parts: dict[str, int] = {}
        self._over: set[str] = set()  # cells of which no task is to begin any more
        self._notes: set[str] = set()  # of workers, each shown once

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._open):
            self._close(key)

    def tasks(self, jobs: Sequence[Job]) -> list[CellTask]:
        """Return the tasks of cells: one a cell, or one a part."""
        made = []
        self._over.clear()
        for job in jobs:
            count = self._parts[job.cell.key] = self._count(job)
            for index in range(count):
                name = job.cell.title + (f" shard {index + 1} of {count}" if count > 1 else "")
                made.append(CellTask(name, job=job, part=Shard(index, count)))
        return made

    def _count(self, job: Job) -> int:
        """Return the number of parts of a cell: one an actor, if each part is large enough."""
        if self.shards is not None:
            return self.shards
        requests = count_requests(job.tasks.load(job.cell.task), job.config.limit)
        return max(1, min(self.size, requests // PART_REQUESTS))

    def begin(self, task: CellTask) -> Payload | None:
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
        return Payload(cell.key, config, task.part, dict(journal), journal.state_bytes, seconds, task.shrink)

    def _claim(self, job: Job) -> bool:
        """Claim a cell, unless another run has it."""
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

    def on_message(self, task: CellTask, message: tuple[Json, int, float]) -> bool:
        opened = self._open.get(task.job.cell.key)
        if opened is None:  # another part has failed
            return False
        answers, state_bytes, seconds = message
        opened.journal.add(answers, state_bytes, seconds)
        opened.seconds += seconds
        self.view.advanced(task.job.cell, len(answers))
        return bool(answers)

    def on_done(self, task: CellTask, result: Any) -> list[CellTask]:
        cell = task.job.cell
        opened = self._open.get(cell.key)
        if opened is None:
            return []
        if not task.part.unsharded:
            opened.remaining, opened.halved = opened.remaining - 1, opened.halved + result
            opened.shrink = max(opened.shrink, task.shrink)
            if opened.remaining:
                return []
            name, small = f"{cell.title}, the whole", opened.shrink
            return [CellTask(name, alone=small > 0, shrink=small, follows=True, job=task.job)]
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

    def on_failed(self, task: CellTask, problem: str, text: str) -> None:
        cell = task.job.cell
        if cell.key not in self._open:
            return
        self._close(cell.key)
        self._over.add(cell.key)
        self.sweep.failed.append(cell)
        self.view.failed(cell, problem, self.store.failed(cell.name, cell.key, text))

    def on_death(self, number: int, task: CellTask | None, problem: str) -> None:
        at = f" at {task.name}" if task else ""
        self.view.note(f"worker {number} was lost{at} ({problem}); see {self.logs / f'worker-{number}.log'}")

    def note(self, text: str) -> None:
        self.view.note(text)

    def log(self, number: int, text: str) -> None:
        path = self.logs / f"worker-{number}.log"
        with writing(self.store.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')} {text.rstrip()}\n")

    def _close(self, key: str) -> None:
        opened = self._open.pop(key)
        opened.journal.close()
        opened.claim.close()
