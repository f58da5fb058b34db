"""A folder of records: `cells/<name>.json`, one per finished cell, and `samples/<name>.jsonl`.

Files appear whole or not at all: written beside, flushed, then renamed. The record comes last, so a record that exists
is a finished cell.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from dart_eval.errors import UserError
from dart_eval.results.record import Record


class StoreError(UserError):
    """The results folder cannot be written."""


class Store:
    """The records in `folder`; nothing is created before the first `save`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str, key: str) -> Path:
        """Where the record of a cell lives; `name` is for people, the key decides."""
        return self.folder / "cells" / f"{name}-{key[:16]}.json"

    def samples_path(self, name: str, key: str) -> Path:
        """Where its samples live."""
        return self.folder / "samples" / f"{name}-{key[:16]}.jsonl"

    def get(self, name: str, key: str) -> Record | None:
        """The finished cell's record, or None; an unreadable file counts as not finished."""
        path = self.path(name, key)
        if not path.is_file():
            return None
        try:
            record = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            return None
        return record if record.key == key else None

    def save(self, name: str, record: Record) -> Path:
        """Write samples, then the record.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            lines = "".join(json.dumps(s, ensure_ascii=False, sort_keys=True) + "\n" for s in record.samples)
            write_atomically(self.samples_path(name, record.key), lines)
            text = json.dumps(record.to_json(), ensure_ascii=False, indent=1, sort_keys=True) + "\n"
            path = self.path(name, record.key)
            write_atomically(path, text)
        except OSError as error:
            raise StoreError(
                f"results cannot be written to {self.folder} ({error.strerror or error})",
                "choose another --output",
            ) from None
        return path

    def load(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            UserError: no such folder, nothing in it, or a file that is not a record of a known version.
        """
        files = sorted(f for f in (self.folder / "cells").glob("*.json") if f.is_file())
        if not files:
            raise UserError(
                f"no results in {self.folder}",
                f"give the folder of an earlier run, or: dart-eval run --tasks smoke --output {self.folder}",
            )
        records = []
        for file in files:
            try:
                records.append(Record.from_json(json.loads(file.read_text(encoding="utf-8"))))
            except ValueError as error:
                raise UserError(
                    f"{file} cannot be read ({error})", "remove it, or use the version that wrote it"
                ) from None
        return sorted(records, key=lambda r: (r.created, r.key))


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either old or new, never half, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
