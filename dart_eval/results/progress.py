"""How far the runs of a folder are: a note of each run's cells in `.locks/`, and a lock as long as it is at work."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dart_eval.util.errors import writing
from dart_eval.util.files import read_regular, write_atomically

ANEW = "--force"  # the first line of a note of cells that are made anew


class Progress(NamedTuple):
    """The cells of the runs that have not come to their end, and whether one of these runs is still at work."""

    done: int
    planned: int
    running: bool


@contextlib.contextmanager
def at_work(folder: Path, records: Iterable[Path], anew: bool = False) -> Iterator[None]:
    """Note in the folder, while the block runs, that this process makes these records.

    The note of a process that was stopped stays until the next run begins. anew: records that are there do not count.

    Raises:
        StoreError: the folder cannot be written.
    """
    note = folder / ".locks" / f"{uuid.uuid4().hex}.run"
    lock = FileLock(note.with_suffix(".lock"))
    with writing(folder):
        note.parent.mkdir(parents=True, exist_ok=True)
        for old in note.parent.glob("*.run"):
            if not _held(old):
                _remove(old)
        lock.acquire()
        write_atomically(note, "".join(f"{line}\n" for line in [*[ANEW] * anew, *(record.name for record in records)]))
    try:
        yield
    finally:
        lock.release()
    _remove(note)


def progress(folder: Path) -> Progress | None:
    """Return how far the runs at work on a folder are, or got before they were stopped; None without one."""
    names: dict[str, float] = {}  # a record's file -> the time since which it counts
    running = False
    for note in (folder / ".locks").glob("*.run"):
        with contextlib.suppress(OSError):  # it has come to its end meanwhile
            lines = read_regular(note).decode().splitlines()
            since = note.stat().st_mtime if ANEW in lines else 0.0
            for name in set(lines) - {ANEW}:  # workers of one run have a note each, and the first tells when it began
                names[name] = min(since, names.get(name, since))
            running = _held(note) or running
    done = sum(_made(folder / "cells" / name) >= since for name, since in names.items())
    return Progress(done, len(names), running) if names and (running or done < len(names)) else None


def _made(record: Path) -> float:
    """Return when a record was written; below all times if it was not."""
    try:
        return record.stat().st_mtime
    except OSError:
        return -1.0


def _held(note: Path) -> bool:
    """Whether the process that wrote the note of a run is still at work."""
    try:
        with FileLock(note.with_suffix(".lock"), timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # another user's folder
        return False


def _remove(note: Path) -> None:
    for path in (note, note.with_suffix(".lock")):
        path.unlink(missing_ok=True)
