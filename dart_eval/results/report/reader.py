"""A reader of the folder that reads the samples of each cell once, and holds only what the page and tables show."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.results import generated
from dart_eval.results.documents import answers
from dart_eval.results.record import Record
from dart_eval.results.store import Store, UnreadSamples


@dataclass(frozen=True)
class CellSamples:
    """The part of a cell's samples that the page needs.

    Attributes:
        samples: the number of documents.
        traced: one sample of each document whose detector closed a window.
        first: the samples of the first documents of each task.
        left_out: (task, number) of the other documents.
        chance: the accuracy under guessing; None without candidates.
        texts: counts of generated texts; None if the answers are no texts.
    """

    samples: int
    traced: list[dict[str, Any]]
    first: list[dict[str, Any]]
    left_out: set[tuple[str, int]]
    chance: float | None
    texts: dict[str, Any] | None


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
        choices = [s for s in found if len(answers(s)) > 1 and "acc" in s["metrics"]]
        whole = all(s["metrics"]["acc"] in (0, 1) for s in choices)  # a share of the probability has no known chance
        guesses = [1 / len(answers(s)) for s in choices if whole]
        watched = {(s["task"], s["doc_id"]): s for s in found if _traced(s)}  # each filter's sample has the trace
        self._looked[record.key] = CellSamples(
            sum(map(len, ids.values())), [*watched.values()], [s for s in found if (s["task"], s["doc_id"]) in first],
            {(task, i) for task, numbers in ids.items() for i in numbers} - first,
            sum(guesses) / len(guesses) if guesses else None, generated.of_texts(record, found),
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

    def counts(self, records: Sequence[Record]) -> dict[str, dict[str, Any] | None]:
        """Return the counts of texts for `generated.table`, by key, without cells whose samples cannot be read."""
        found = {}
        for record in records:
            with contextlib.suppress(UnreadSamples):
                found[record.key] = self.look(record).texts
        return found

    def traces(self, record: Record) -> list[dict[str, Any]]:
        """Return the drift detector's trace of each document on which it closed a window. Raises as `look`."""
        return [s["drift"] for s in self.look(record).traced]


def _traced(sample: dict[str, Any]) -> bool:
    drift = sample.get("drift") or {"signal": [], "window": 0}
    return len(drift["signal"]) > 0 and drift["window"] > 0
