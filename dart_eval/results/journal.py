"""The answers of a running cell so far: an append-only file, so that a stopped cell loses at most one batch.

One line per batch: a checksum, then JSON. A line that was cut short (power, full disk, kill) ends the file: the lines
before it count, and the rest is cut off and computed again.
"""

from __future__ import annotations

import json
import os
import zlib
from io import FileIO
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from dart_eval.results import layout
from dart_eval.util.errors import writing
from dart_eval.util.files import read_regular
from dart_eval.util.text import Json

# answers, state_bytes, seconds
BATCH = TypeAdapter(tuple[Json, layout.Count, Annotated[layout.Finite, Field(ge=0)]])


class Journal(Json):
    """Answers by request, kept in memory and, where a path is given, on disk.

    Args:
        path: file to continue or to create at the first batch; None keeps nothing on disk.

    Attributes:
        state_bytes: largest method state per sequence that any batch had.
        seconds: wall time of the batches that an earlier process had finished.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path = path
        self.state_bytes = 0
        self.seconds = 0.0
        self._total_seconds = 0.0  # with those of our own batches
        self._file: FileIO | None = None
        if path is not None and os.path.lexists(path):
            self._read(path)

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
        self._total_seconds += seconds
        if self.path is None:
            return
        with writing(self.path.parent.parent):
            if self._file is not None and not self._is_there(self._file.fileno()):  # somebody has deleted it
                self.close()
                answers, state_bytes, seconds = self, self.state_bytes, self._total_seconds
            text = json.dumps([dict(answers), state_bytes, seconds], ensure_ascii=False).encode()
            line = b"%08x %s\n" % (zlib.crc32(text), text)
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            written = 0
            while written < len(line):  # an unbuffered file may take a part, then report a full disk
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which stays on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_there(self, number: int) -> bool:
        """Whether the open file of that number still has our path."""
        assert self.path is not None
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(number))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Delete everything, once the cell is finished or is to be run anew."""
        self.close()
        self.clear()
        self.state_bytes, self.seconds, self._total_seconds = 0, 0.0, 0.0
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        whole = 0
        data = read_regular(path)
        for line in data.splitlines(keepends=True):
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                break
            try:
                answers, state_bytes, seconds = layout.read(text, BATCH)
            except ValueError:
                break
            self.update(answers)
            self.state_bytes = max(self.state_bytes, state_bytes)
            self.seconds += seconds
            self._total_seconds += seconds
            whole += len(line)
        if whole < len(data):
            os.truncate(path, whole)
