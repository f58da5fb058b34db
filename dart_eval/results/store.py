"""A folder of records, safe against crashes and against a second process.

    cells/<name>-<key>.json     the record of a finished cell
    samples/<name>-<key>.jsonl  its samples
    texts/<task>-<hash>.jsonl   prompts and answers of a task, once for all cells that were asked the same
    partial/<name>-<key>.jsonl  what an unfinished cell has answered so far
    failed/<name>-<key>.txt     the traceback of a cell that failed; gone when it succeeds
    states/<hash>.safetensors   dense's last hidden states on a task (`sweep.worker`); made again if they are missing
    .locks/                     who is at work on which cell

Files appear complete or not at all: written beside, flushed, then renamed. The record comes last and has the digests of
the others, so a readable record is a finished cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter

from dart_eval.results.record import Count, Document, Finite, NewerSchema, Record, Sample, described, holds, read
from dart_eval.util.errors import UserError, remark, writing
from dart_eval.util.files import append, check_name, read_regular, reason, safe, write_atomically
from dart_eval.util.text import Json

ENDINGS = {
    "cells": "json", "samples": "jsonl", "texts": "jsonl", "partial": "jsonl", "failed": "txt", ".locks": "lock",
}  # fmt: skip
LINES = {"samples": TypeAdapter(Annotated[Json, holds(Sample)]), "texts": TypeAdapter(Annotated[Json, holds(Document)])}
BATCH = TypeAdapter(tuple[Json, Count, Annotated[Finite, Field(ge=0)]])  # answers, state_bytes, seconds
REDO = "repeat the `dart-eval run` that made it (it sets the file aside and redoes the cell), or remove it"


class UnreadSamples(UserError):
    """A cell's samples or texts are missing or damaged."""


class Journal(Json):
    """The answers of a running cell by request, in memory and on disk, so that a stopped cell loses at most one batch.

    The file has one line per batch: a checksum, then JSON. A line that was cut short (power, full disk, kill) ends it:
    the lines before it count, and the rest is cut off and computed again.

    Args:
        path: file to continue or to create at the first batch; None keeps nothing on disk.

    Attributes:
        state_bytes: largest method state per sequence that any batch had.
        seconds: wall time of the batches that an earlier process had finished.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path, self.state_bytes, self.seconds = path, 0, 0.0
        if path is None or not os.path.lexists(path):
            return
        whole, data = 0, read_regular(path)
        for line in data.splitlines(keepends=True):
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                break
            try:
                answers, state_bytes, seconds = read(text, BATCH)
            except ValueError:
                break
            self.update(answers)
            self.state_bytes = max(self.state_bytes, state_bytes)
            self.seconds += seconds
            whole += len(line)
        if whole < len(data):
            with append(path) as file:
                file.truncate(whole)

    def add(self, answers: Json, state_bytes: int, seconds: float) -> None:
        """Write a batch. On return it is on disk, safe from a crash.

        Args:
            answers: request -> answer, plain JSON data.
            state_bytes: of the method, per sequence.
            seconds: wall time of the batch.

        Raises:
            StoreError: the disk is full, for example.
        """
        self.update(answers)
        self.state_bytes = max(self.state_bytes, state_bytes)
        if self.path is None:
            return
        text = json.dumps([answers, state_bytes, seconds], ensure_ascii=False).encode()
        with writing(self.path.parent.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with append(self.path) as file:
                file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete everything, once the cell is finished or is to be run anew."""
        self.clear()
        self.state_bytes, self.seconds = 0, 0.0
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Store:
    """The records in `folder`; nothing is created before a cell begins."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, kind: str, name: str, key: str) -> Path:
        """Return the path of a cell's file of a kind of `ENDINGS`; `name` is for readers, the key decides."""
        return self.folder / kind / f"{safe(name)}-{key[:16]}.{ENDINGS[kind]}"

    def written_since(self, kind: str, name: str, key: str, time: float) -> bool:
        """Whether a cell has got a file of a kind since a time (seconds since the epoch)."""
        try:
            return self.file(kind, name, key).stat().st_mtime >= time
        except OSError:
            return False

    # -- running cells ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, name: str, key: str) -> Iterator[bool]:
        """Yield whether this process may work on the cell while the block runs, as no other does.

        The claim ends with the process, however it ends.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.file(".locks", name, key)
        lock = FileLock(path)
        with writing(self.folder), contextlib.suppress(Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def journal(self, name: str, key: str) -> Journal:
        """Return the journal of an unfinished cell; its claim must be held."""
        with writing(self.folder):
            return Journal(self.file("partial", name, key))

    def get(self, name: str, key: str) -> Record | None:
        """Return a finished cell's record; None if there is none, or if one of its files is missing or damaged.

        Raises:
            UserError: a newer version of this program wrote it.
        """
        path = self.file("cells", name, key)
        try:
            record = Record.from_json(read_regular(path))
            self._data(record, "samples")
            self._data(record, "texts")
        except NewerSchema as error:
            raise UserError(f"{path} cannot be read ({error})", "use that version, or another --output") from None
        except (OSError, ValueError):
            return None
        return record if record.key == key else None

    def set_aside(self, name: str, key: str) -> list[Path]:
        """Move away a record that `get` did not accept, and its samples; `save` replaces damaged texts.

        The cell's claim must be held. Samples without a record stay: the process was stopped between the two, and
        they will be written again.

        Returns:
            The new names of existing files.
        """
        record, samples = self.file("cells", name, key), self.file("samples", name, key)
        for kind in ("cells", "samples", "texts"):
            for temporary in (self.folder / kind).glob(f".{record.stem}.*"):  # half-written
                temporary.unlink(missing_ok=True)
        damaged = [path for path in (record, samples) if os.path.lexists(record) and os.path.lexists(path)]
        return [path.replace(path.with_name(f"{path.name}.damaged")) for path in damaged]

    def save(self, name: str, record: Record, texts: Sequence[Json] = ()) -> Record:
        """Write texts and samples, then the record that names them.

        Returns:
            The record as written, with `files` filled in.

        Raises:
            StoreError: the folder cannot be written.
        """
        path, files = self.file("cells", name, record.key), dict[str, Json]()
        with writing(self.folder):
            for kind, rows in (("samples", record.samples), ("texts", texts)):
                text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
                digest = hashlib.sha256(text.encode()).hexdigest()
                of = (name, record.key) if kind == "samples" else (str(record.inputs["task"]), digest)
                if rows or kind == "samples":
                    file = self.file(kind, *of)
                    write_atomically(file, text, path.stem)
                    files[kind] = {"name": file.name, "n": len(rows), "sha256": digest}
            record = dataclasses.replace(record, files=files)
            text = json.dumps(record.to_json(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
            write_atomically(path, text, path.stem)
            self.file("failed", name, record.key).unlink(missing_ok=True)
        return record

    def failed(self, name: str, key: str, text: str) -> Path:
        """Write why a cell failed; return the file."""
        path = self.file("failed", name, key)
        with writing(self.folder):
            write_atomically(path, text)
        return path

    # -- reading ---------------------------------------------------------------------------------------------

    def load(self, strict: bool = False) -> list[Record]:
        """Return all records, oldest first, each once. Files that hold none are named on stderr.

        Args:
            strict: whether to refuse such files.

        Raises:
            UserError: no such folder, or no readable record in it.
        """
        check_name(self.folder, "folder")
        records: dict[str, Record] = {}
        unread: list[UserError] = []
        for file in sorted((self.folder / "cells").glob("*.json")):
            try:
                record = Record.from_json(read_regular(file))
            except (OSError, ValueError) as error:
                remedy = "use that version" if isinstance(error, NewerSchema) else REDO
                unread.append(UserError(f"{file} cannot be read ({reason(error)})", remedy))
                continue
            if record.key not in records or records[record.key].created < record.created:  # a copy counts once
                records[record.key] = record
        if unread and (strict or not records):
            raise unread[0]
        if not records:
            raise UserError(
                f"no results in {self.folder}",
                f"give the folder of an earlier run, or: dart-eval run --tasks smoke --output {self.folder}",
            )
        for left_out in unread:
            remark(f"left out: {left_out}")
        return sorted(records.values(), key=lambda r: (r.created, r.key))

    def samples(self, record: Record) -> list[Json]:
        """Return the samples of a record of this folder, one per document, task and filter.

        Raises:
            UnreadSamples: their file is missing or damaged, or has answers that are not finite (from older versions).
        """
        lines = self._lines(record, "samples")
        answers = ([x for r in line["responses"] for x in (r if isinstance(r, list) else [r])] for line in lines)
        if wrong := sum(any(isinstance(x, float) and not math.isfinite(x) for x in flat) for flat in answers):
            raise UnreadSamples(
                f"{wrong} of {len(lines)} answers of {described(record)} in {self.folder} are NaN or infinite",
                "run the cell again, in another --dtype or with other weights",
            )
        return lines

    def texts(self, record: Record) -> dict[tuple[str, int], Json]:
        """Return (task, doc_id) -> prompt, choices and target of a record's documents; empty if not stored.

        Raises:
            UnreadSamples: their file is missing or damaged.
        """
        return {(line["task"], line["doc_id"]): line for line in self._lines(record, "texts")}

    def _lines(self, record: Record, kind: str) -> list[Json]:
        """Return the lines of a record's file of a kind."""
        try:
            return [read(x, LINES[kind], f"line {i}") for i, x in enumerate(self._data(record, kind).splitlines(), 1)]
        except (OSError, ValueError) as error:
            raise UnreadSamples(
                f"the {kind} of {described(record)} in {self.folder} cannot be read ({reason(error)})",
                "repeat the `dart-eval run` that made them: it redoes the cell",
            ) from None

    def _data(self, record: Record, kind: str) -> bytes:
        """Return a record's file of a kind. Raises OSError if it is missing, and ValueError if it is damaged."""
        known = record.files.get(kind)
        if known is None:
            if kind == "texts":
                return b""
            raise ValueError("it has none")
        data = read_regular(self.folder / kind / known["name"])
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise ValueError("its digest does not fit")
        return data
