"""What the drift detectors saw: a summary per cell, and a few documents to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dart_eval.results.record import Record
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.text import finite, percent, several

TRACES = 6  # documents drawn
PER_CELL = 2  # of them from one cell at most


@dataclass(frozen=True)
class Trace:
    """One document's signal."""

    title: str
    note: str
    words: str
    style: int
    signal: list[float | None]
    window: int
    threshold: float | None
    remasks: list[float]


class Drift:
    """Collects traces as the cells' samples go by.

    Attributes:
        rows: one summary per cell that has traces.
        documents: traced documents of all cells.
    """

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self.rows: list[dict[str, str]] = []
        self.documents = 0
        self._candidates: list[Trace] = []

    def add(self, record: Record, samples: list[dict[str, Any]]) -> None:
        """Look at one cell."""
        traced = [s for s in samples if _usable(s.get("drift"))]
        if not traced:
            return
        windows = below = 0
        for s in traced:
            threshold = s["drift"].get("threshold")
            signal = [x for x in s["drift"]["signal"] if finite(x)]
            windows += len(signal)
            below += sum(x < threshold for x in signal) if finite(threshold) else 0
        self.documents += len(traced)
        rate = 1000 * record.remasks / record.tokens if record.tokens else 0.0
        self.rows.append({
            "model": record.inputs["model"]["name"], "task": str(record.inputs["task"]),
            "name": self._cells.name(record), "traced": f"{len(traced)} of {len(samples)}", "windows": str(windows),
            "below": percent(below / windows, 1) if windows else "-", "remasks": str(record.remasks),
            "rate": f"{rate:.2f}",
        })  # fmt: skip
        traced.sort(key=lambda s: (-len(s["drift"].get("remasks") or []), -len(s["drift"]["signal"]), s["doc_id"]))
        self._candidates += [self._trace(record, s) for s in traced[:PER_CELL] if len(s["drift"]["signal"]) > 1]

    @property
    def traces(self) -> list[Trace]:
        """The documents to draw: those with most re-masks, then most windows."""
        chosen = sorted(enumerate(self._candidates), key=lambda c: (-len(c[1].remasks), -len(c[1].signal), c[0]))
        return [trace for _, trace in sorted(chosen[:TRACES])]

    def _trace(self, record: Record, s: dict[str, Any]) -> Trace:
        drift = s["drift"]
        signal = [x if finite(x) else None for x in drift["signal"]]
        remasks = [x for x in drift.get("remasks") or [] if finite(x)]
        threshold = drift.get("threshold")
        numbers = [x for x in signal if x is not None]
        words = f"{several(len(signal), 'window')} of {drift['window']} tokens"
        if numbers:
            words += f", cosine {min(numbers):.3f} to {max(numbers):.3f}"
        if finite(threshold):
            words += f", threshold {threshold:.3f}, {sum(x < threshold for x in numbers)} below it"
        words += f", re-masked at token {', '.join(f'{x:g}' for x in remasks)}" if remasks else ", no re-mask"
        model = f"{record.inputs['model']['name']}, " if len(self._cells.models) > 1 else ""
        return Trace(
            f"{s['task']}, document {s['doc_id']}",
            f"{model}{self._cells.name(record)}; {several(len(remasks), 're-mask')}",
            words, self._cells.styles.get(self._cells.labels[record.key], 0), signal, int(drift["window"]),
            threshold if finite(threshold) else None, remasks,
        )  # fmt: skip


def _usable(drift: Any) -> bool:
    return isinstance(drift, dict) and bool(drift.get("signal")) and finite(drift.get("window"))
