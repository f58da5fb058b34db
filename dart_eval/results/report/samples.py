"""One pass over the samples of all cells: paired tests, guessing levels, drift traces, documents of the explorer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dart_eval.errors import UserError
from dart_eval.results.outcomes import Outcome, outcome
from dart_eval.results.record import Record
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.drift import Drift
from dart_eval.results.report.explorer import Explorer
from dart_eval.results.report.findings import Findings
from dart_eval.results.store import Store


class Samples:
    """What the sections need of the samples; each cell's file is read once, and outcomes are held for one task.

    Attributes:
        findings: the tests of cells against each other.
        chance: task -> accuracy under guessing, the mean of 1 / choices.
        drift: what the detectors saw.
        explorer: the documents to show.
        unread: names of cells whose samples are missing or damaged. untold: of cells whose prompts are.
    """

    def __init__(self, store: Store, cells: Cells, documents: int) -> None:
        self.findings, self.drift, self.explorer = Findings(cells), Drift(cells), Explorer(cells, documents)
        self.unread: list[str] = []
        self.untold: list[str] = []
        self._guesses: dict[str, dict[tuple[str, Any], float]] = {}
        for _, group in itertools.groupby(enumerate(cells.records), lambda item: _task(item[1])):  # they are sorted
            together = list(group)
            found: dict[str, Outcome] = {}
            for index, record in together:
                name = f"{cells.name(record)} on {record.inputs['task']}"
                try:
                    samples = store.samples(record)
                except UserError:
                    self.unread.append(name)
                    continue
                try:
                    texts = store.texts(record)
                except UserError:
                    self.untold.append(name)
                    texts = {}
                found[record.key] = outcome(record, samples)
                for task, document, share in _guesses(record, samples):
                    self._guesses.setdefault(task, {})[document] = share
                self.drift.add(record, samples)
                self.explorer.add(index, record, samples, texts)
            self.findings.add([record for _, record in together], found)

    @property
    def chance(self) -> dict[str, float]:
        """Mean over documents; tasks without choices are missing."""
        return {task: sum(shares.values()) / len(shares) for task, shares in self._guesses.items()}


def _task(record: Record) -> tuple[str, str]:
    return record.inputs["model"]["name"], str(record.inputs["task"])


def _guesses(record: Record, samples: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, Any], float]]:
    """(task, document, 1 / choices), under the document's task and under the cell's (a group)."""
    for s in samples:
        responses = s.get("responses") or []
        if len(responses) > 1 and "acc" in s.get("metrics", {}) and all(isinstance(r, list) for r in responses):
            for task in {s["task"], str(record.inputs["task"])}:
                yield task, (s["task"], s["doc_id"]), 1 / len(responses)
