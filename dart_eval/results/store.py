"""A folder of records, safe against crashes and against a second process.

    cells/<name>-<key>.json     the record of a finished cell
    samples/<name>-<key>.jsonl  its samples
    texts/<task>-<hash>.jsonl   prompts and answers of a task, once for all cells that were asked the same
    partial/<name>-<key>.jsonl  what an unfinished cell has answered so far (see `journal`)
    failed/<name>-<key>.txt     the traceback of a cell that failed; gone when it succeeds
    .locks/                     who is at work on which cell

Files appear whole or not at all: written beside, flushed, then renamed. The record comes last and knows the digests of
the others, so a record that can be read is a finished cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dart_eval.errors import StoreError, UserError
from dart_eval.files import read_regular, write_atomically
from dart_eval.results.journal import Journal
from dart_eval.results.record import NewerSchema, Record


class Store:
    """The records in `folder`; nothing is created before a cell begins."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str, key: str) -> Path:
        """Where the record of a cell lives; `name` is for people, the key decides."""
        return self.folder / "cells" / f"{name}-{key[:16]}.json"

    def samples_path(self, name: str, key: str) -> Path:
        """Where its samples live."""
        return self.folder / "samples" / f"{name}-{key[:16]}.jsonl"

    # -- running cells ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, name: str, key: str) -> Iterator[bool]:
        """Whether this process may work on the cell while the block runs: nobody else does.

        The claim ends with the process, however it ends.

        Raises:
            StoreError: the folder cannot be written.
        """
        lock = FileLock(self.folder / ".locks" / f"{name}-{key[:16]}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise StoreError(self.folder, error) from None
        try:
            yield True
        finally:
            lock.release()

    def journal(self, name: str, key: str) -> Journal:
        """The journal of an unfinished cell; its claim must be held."""
        try:
            return Journal(self.folder / "partial" / f"{name}-{key[:16]}.jsonl")
        except OSError as error:
            raise StoreError(self.folder, error) from None

    def get(self, name: str, key: str) -> Record | None:
        """The finished cell's record; None where there is none or it or its samples are damaged.

        Raises:
            UserError: a newer version of this program wrote it.
        """
        path = self.path(name, key)
        try:
            record = Record.from_json(json.loads(read_regular(path)))
            self._lines(record, "samples")
        except NewerSchema as error:
            raise UserError(f"{path} cannot be read ({error})", "use that version, or another --output") from None
        except (OSError, ValueError):
            return None
        return record if record.key == key else None

    def set_aside(self, name: str, key: str) -> list[Path]:
        """Move away a record that `get` did not accept, and its samples; the cell's claim must be held.

        Returns:
            The new names of the files that were there. Half-written temporary files are removed without a word, and
            samples without a record stay: the process was stopped between the two, and they will be written again.
        """
        moved = []
        for kind in ("cells", "samples", "texts"):
            for left in (self.folder / kind).glob(f".{self.path(name, key).stem}.*"):
                left.unlink(missing_ok=True)
        there = os.path.lexists(self.path(name, key))
        for path in (self.path(name, key), self.samples_path(name, key)):
            if there and os.path.lexists(path):
                number = 1
                while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
                    number += 1
                path.rename(aside)
                moved.append(aside)
        return moved

    def save(self, name: str, record: Record, texts: Sequence[dict[str, Any]] = ()) -> Record:
        """Write texts and samples, then the record that names them.

        Returns:
            The record as written, with `files` filled in.

        Raises:
            StoreError: the folder cannot be written.
        """
        files = {}
        try:
            path = self.samples_path(name, record.key)
            files["samples"] = _write_lines(path, record.samples, path.stem)
            if texts:
                digest = hashlib.sha256(_lines(texts).encode()).hexdigest()
                path = self.folder / "texts" / f"{record.inputs['task']}-{digest[:16]}.jsonl"
                # Cells of one task share it: what is half-written is this cell's.
                files["texts"] = _write_lines(path, texts, self.samples_path(name, record.key).stem)
            record = dataclasses.replace(record, files=files)
            text = json.dumps(record.to_json(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
            write_atomically(self.path(name, record.key), text)
            (self.folder / "failed" / f"{name}-{record.key[:16]}.txt").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(self.folder, error) from None
        return record

    def failed(self, name: str, key: str, text: str) -> Path:
        """Keep why a cell failed; returns the file."""
        path = self.folder / "failed" / f"{name}-{key[:16]}.txt"
        try:
            write_atomically(path, text)
        except OSError as error:
            raise StoreError(self.folder, error) from None
        return path

    # -- reading ---------------------------------------------------------------------------------------------

    def load(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            UserError: no such folder, nothing in it, or a file that is not a record of a known version.
        """
        files = sorted((self.folder / "cells").glob("*.json"))
        if not files:
            raise UserError(
                f"no results in {self.folder}",
                f"give the folder of an earlier run, or: dart-eval run --tasks smoke --output {self.folder}",
            )
        records = []
        for file in files:
            try:
                records.append(Record.from_json(json.loads(read_regular(file))))
            except NewerSchema as error:
                raise UserError(f"{file} cannot be read ({error})", "use that version") from None
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{file} cannot be read ({getattr(error, 'strerror', None) or error})",
                    "give the `dart-eval run` that made it again (it sets the file aside and redoes the cell), or "
                    "remove it",
                ) from None
        return sorted(records, key=lambda r: (r.created, r.key))

    def samples(self, record: Record) -> list[dict[str, Any]]:
        """The samples of a record of this folder, one per document, task and filter.

        Raises:
            UserError: their file is missing, or not as it was written.
        """
        try:
            return self._lines(record, "samples")
        except (OSError, ValueError) as error:
            inputs = record.inputs
            raise UserError(
                f"the samples of {inputs['task']} under {inputs['method']} at sparsity {inputs['sparsity']:g} in "
                f"{self.folder} cannot be read ({getattr(error, 'strerror', None) or error})",
                "give the `dart-eval run` that made them again: it redoes the cell",
            ) from None

    def texts(self, record: Record) -> dict[tuple[str, int], dict[str, Any]]:
        """(task, doc_id) -> prompt, choices and target of a record's documents; empty where they were not kept."""
        try:
            return {(line["task"], line["doc_id"]): line for line in self._lines(record, "texts")}
        except (OSError, ValueError):
            return {}

    def _lines(self, record: Record, kind: str) -> list[dict[str, Any]]:
        """A record's file of that kind.

        Raises:
            OSError: it is not there. ValueError: it is damaged.
        """
        known = record.files.get(kind)
        if known is None and kind == "texts":
            return []
        if known is None:  # schema 1: no digest, but a name that follows from the record's
            (path,) = (self.folder / kind).glob(f"*-{record.key[:16]}.jsonl")
            data = read_regular(path)
        else:
            data = read_regular(self.folder / kind / known["name"])
            if hashlib.sha256(data).hexdigest() != known["sha256"]:
                raise ValueError("its digest does not fit")
        return [json.loads(line) for line in data.splitlines()]


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]], owner: str) -> dict[str, Any]:
    text = _lines(rows)
    write_atomically(path, text, owner)
    return {"name": path.name, "n": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
