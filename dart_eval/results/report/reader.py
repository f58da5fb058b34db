"""A reader of the folder that reads the samples of each cell once, and holds only what the page and tables show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.results.record import Record
from dart_eval.results.store import Store


@dataclass(frozen=True)
class CellSamples:
    """The part of a cell's samples that the page needs.

    Attributes:
        first: the samples of the first documents of each task.
        left_out: (task, number) of the other documents.
    """

    first: list[dict[str, Any]]
    left_out: set[tuple[str, int]]


class Reader(Store):
    """A store that remembers what it has read; `most` documents of each task are shown."""

    def __init__(self, folder: str | Path, most: int = 0) -> None:
        super().__init__(folder)
        self.most = most
        self._looked: dict[str, CellSamples] = {}

    def samples(self, record: Record) -> list[dict[str, Any]]:
        """Return all samples of a record; see `Store.samples`."""
        found = super().samples(record)
        ids: dict[str, set[int]] = {}
        for s in found:
            ids.setdefault(s["task"], set()).add(s["doc_id"])
        first = {(task, i) for task, numbers in ids.items() for i in sorted(numbers)[: self.most]}
        self._looked[record.key] = CellSamples(
            [s for s in found if (s["task"], s["doc_id"]) in first],
            {(task, i) for task, numbers in ids.items() for i in numbers} - first,
        )  # fmt: skip
        return found

    def look(self, record: Record) -> CellSamples:
        """Return the part of a record's samples that the page needs.

        Raises:
            UnreadSamples: they cannot be read.
        """
        if record.key not in self._looked:
            self.samples(record)
        return self._looked[record.key]
