"""A folder of records, safe against crashes and against a second process.

    cells/<name>-<key>.json     the record of a finished cell
    samples/<name>-<key>.jsonl  its samples
    texts/<task>-<hash>.jsonl   prompts and answers of a task, once for all cells that were asked the same
    partial/<name>-<key>.jsonl  what an unfinished cell has answered so far (see `journal`)
    failed/<name>-<key>.txt     the traceback of a cell that failed; gone when it succeeds
    .locks/                     who is at work on which cell, and the cells of each run (see `progress`)

Files appear complete or not at all: written beside, flushed, then renamed. The record comes last and has the digests of
the others, so a readable record is a finished cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from dart_eval.results import layout
from dart_eval.results.format import sparsity
from dart_eval.results.journal import Journal
from dart_eval.results.record import NewerSchema, Record
from dart_eval.util.errors import UserError, remark, writing
from dart_eval.util.files import check_name, read_regular, reason, safe, write_atomically
from dart_eval.util.text import Json

SAMPLE, DOCUMENT = TypeAdapter(layout.Sample), TypeAdapter(layout.Document)
Kind = Literal["cells", "samples", "partial", "failed", ".locks"]  # folders with a file for each cell
ENDINGS: dict[Kind, str] = {
    "cells": "json", "samples": "jsonl", "partial": "jsonl", "failed": "txt", ".locks": "lock",
}  # fmt: skip
REDO = "repeat the `dart-eval run` that made it (it sets the file aside and redoes the cell), or remove it"


class UnreadSamples(UserError):
    """A cell's samples or texts are missing or damaged."""


@dataclass(frozen=True)
class Scan:
    """The contents of a folder.

    Attributes:
        records: oldest first, each once.
        files: key -> the file of its record.
        unread: files without a record, and their errors.
    """

    records: list[Record]
    files: dict[str, Path]
    unread: dict[Path, UserError]

    def report(self) -> None:
        """Report on stderr what was left out."""
        for error in self.unread.values():
            remark(f"left out: {error}")


class Store:
    """The records in `folder`; nothing is created before a cell begins."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, kind: Kind, name: str, key: str) -> Path:
        """Return the path of a cell's file of a kind; `name` is for readers, the key decides."""
        ending = f"-{key[:16]}.{ENDINGS[kind]}"
        path = self.folder / kind / f"{safe(name)}{ending}"
        if path.exists():
            return path
        return next(path.parent.glob(f"*{ending}"), path)  # made under another spelling of the method

    def written_since(self, kind: Kind, name: str, key: str, time: float) -> bool:
        """Whether a cell has got a record or answers, or has failed, since a time (seconds since the epoch)."""
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
        path = self.file(".locks", "cell", key)  # one for all spellings of a method
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
            record = _read(path)
            self._lines(record, "samples", SAMPLE)
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
        moved = []
        for path in (record, samples) if os.path.lexists(record) else ():
            if os.path.lexists(path):
                names = (path.with_name(f"{path.name}.damaged-{i}") for i in itertools.count(1))
                moved.append(path.rename(next(name for name in names if not os.path.lexists(name))))
        return moved

    def save(self, name: str, record: Record, texts: Sequence[Json] = ()) -> Record:
        """Write texts and samples, then the record that names them.

        Returns:
            The record as written, with `files` filled in.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.file("samples", name, record.key)  # whose stem half-written files of this cell begin with
        with writing(self.folder):
            files = {"samples": _write_lines(path, record.samples, path.stem)}
            if texts:
                digest = hashlib.sha256(_lines(texts).encode()).hexdigest()
                shared = self.folder / "texts" / f"{safe(record.inputs['task'])}-{digest[:16]}.jsonl"
                files["texts"] = _write_lines(shared, texts, path.stem)
            record = dataclasses.replace(record, files=files)
            text = json.dumps(record.to_json(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
            write_atomically(self.file("cells", name, record.key), text, path.stem)
            self.file("failed", name, record.key).unlink(missing_ok=True)
        return record

    def failed(self, name: str, key: str, text: str) -> Path:
        """Write why a cell failed; return the file."""
        path = self.file("failed", name, key)
        with writing(self.folder):
            write_atomically(path, text)
        return path

    # -- reading ---------------------------------------------------------------------------------------------

    def scan(self) -> Scan:
        """Read the folder.

        Raises:
            UserError: no such folder, or no readable record in it.
        """
        check_name(self.folder, "folder")
        files = sorted((self.folder / "cells").glob("*.json"))
        if not files:
            raise UserError(
                f"no results in {self.folder}",
                f"give the folder of an earlier run, or: dart-eval run --tasks smoke --output {self.folder}",
            )
        by_key: dict[str, tuple[Path, Record]] = {}
        unread: dict[Path, UserError] = {}
        for file in files:
            try:
                record = _read(file)
            except (OSError, ValueError) as error:
                remedy = "use that version" if isinstance(error, NewerSchema) else REDO
                unread[file] = UserError(f"{file} cannot be read ({reason(error)})", remedy)
                continue
            if record.key not in by_key or by_key[record.key][1].created < record.created:  # a copy counts once
                by_key[record.key] = file, record
        if not by_key:
            first = next(iter(unread.values()))
            more = f", and none of the {len(unread) - 1} others there can" if len(unread) > 1 else ""
            raise UserError(f"{first.problem}{more}", first.remedy)
        records = sorted((r for _, r in by_key.values()), key=lambda r: (r.created, r.key))
        return Scan(records, {key: file for key, (file, _) in by_key.items()}, unread)

    def load(self) -> list[Record]:
        """Return all records, oldest first, each once; other files are named on stderr and left out.

        Raises:
            UserError: see `scan`.
        """
        scan = self.scan()
        scan.report()
        return scan.records

    def samples(self, record: Record) -> list[Json]:
        """Return the samples of a record of this folder, one per document, task and filter.

        Raises:
            UnreadSamples: their file is missing or damaged, or has answers that are not finite (from older versions).
        """
        lines = self._read_file(record, "samples", SAMPLE)
        if wrong := sum(not _numbers(line.get("responses") or []) for line in lines):
            raise UnreadSamples(
                f"{wrong} of {len(lines)} answers of {self._place(record)} are NaN or infinite",
                "run the cell again, in another --dtype or with other weights",
            )
        return lines

    def texts(self, record: Record) -> dict[tuple[str, int], Json]:
        """Return (task, doc_id) -> prompt, choices and target of a record's documents; empty if not stored.

        Raises:
            UnreadSamples: their file is missing or damaged.
        """
        return {(line["task"], line["doc_id"]): line for line in self._read_file(record, "texts", DOCUMENT)}

    def _read_file(self, record: Record, kind: str, type_: TypeAdapter[Any]) -> list[Json]:
        try:
            return self._lines(record, kind, type_)
        except (OSError, ValueError) as error:
            raise UnreadSamples(
                f"the {kind} of {self._place(record)} cannot be read ({reason(error)})",
                "repeat the `dart-eval run` that made them: it redoes the cell",
            ) from None

    def _place(self, record: Record) -> str:
        inputs = record.inputs
        method = record.settings.get("method") or inputs["method"]
        return f"{inputs['task']} under {method} at {sparsity(inputs['sparsity'])} in {self.folder}"

    def _lines(self, record: Record, kind: str, type_: TypeAdapter[Any]) -> list[Json]:
        """Return the lines of a record's file of that kind. Raises as `_data`."""
        lines = self._data(record, kind).splitlines()
        return [layout.read(line, type_, f"line {i}") for i, line in enumerate(lines, 1)]

    def _data(self, record: Record, kind: str) -> bytes:
        """Return a record's file of that kind.

        Raises:
            OSError: it is missing.
            ValueError: it is damaged.
        """
        known = record.files.get(kind)
        if known is None and kind == "texts":
            return b""
        if known is None:
            raise ValueError(f"it has no {kind}")
        data = read_regular(self.folder / kind / known["name"])
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise ValueError("its digest does not fit")
        return data


def _read(path: Path) -> Record:
    """A record's file.

    Raises:
        OSError: it cannot be read. ValueError: it holds no record.
    """
    return Record.from_json(layout.read(read_regular(path)))


def _lines(rows: Sequence[Json]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _write_lines(path: Path, rows: Sequence[Json], owner: str) -> Json:
    text = _lines(rows)
    write_atomically(path, text, owner)
    return {"name": path.name, "n": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _numbers(responses: Sequence[object]) -> bool:
    """Whether the log-likelihoods among a document's answers are finite."""
    flat = [x for r in responses for x in (r if isinstance(r, list) else [r])]
    return all(math.isfinite(x) for x in flat if isinstance(x, float))
