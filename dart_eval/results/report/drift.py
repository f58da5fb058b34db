"""What the drift detectors saw: a summary of each cell, and a few documents to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dart_eval.results.report.cells import Cell, finite
from dart_eval.results.report.charts import Chart, trace
from dart_eval.results.report.head import listed
from dart_eval.results.writers import Table

TRACES = 6  # documents drawn
PER_CELL = 2  # of them from one cell at most
HEADS = ["task", "method", "documents traced", "windows", "below threshold", "alarms", "re-masks", "per 1000 tokens"]
NOTE = (
    "A document has a trace where a window was full after its mask was made. Re-masks are those of all tokens of the "
    "cell. After a re-mask a detector may compare with newer windows: a jump there is no sign of better answers."
)


class Drift:
    """Collects traces as the cells' samples go by; `documents` counts those that were traced."""

    def __init__(self, looks: Mapping[str, int]) -> None:
        self._looks = looks
        self.documents = 0
        self._rows: list[list[str]] = []
        self._charts: list[tuple[int, int, Chart]] = []

    def add(self, cell: Cell, samples: list[dict[str, Any]]) -> None:
        """Look at one cell."""
        traced = [s for s in samples if isinstance(d := s.get("drift"), dict) and d["signal"] and d["window"] > 0]
        if not traced:
            return
        record = cell.record
        windows = below = alarms = 0
        for s in traced:
            signal = [x for x in s["drift"]["signal"] if finite(x)]
            windows += len(signal)
            below += sum(x < t for x in signal) if finite(t := s["drift"].get("threshold")) else 0
            alarms += len(s["drift"].get("alarms") or [])
        self.documents += len(traced)
        self._rows.append([
            str(record.inputs["task"]), cell.name, f"{len(traced)} of {len(samples)}", str(windows),
            f"{100 * below / windows:.1f} %" if windows else "-", str(alarms), str(record.remasks),
            f"{1000 * record.remasks / record.tokens:.2f}" if record.tokens else "-",
        ])  # fmt: skip
        traced.sort(key=lambda s: (-len(s["drift"].get("remasks") or []), -len(s["drift"]["signal"]), s["doc_id"]))
        for s in traced[:PER_CELL]:
            if len(s["drift"]["signal"]) > 1:
                remasks = len(s["drift"].get("remasks") or [])
                self._charts.append((-remasks, -len(s["drift"]["signal"]), self._chart(cell, s)))

    def table(self) -> Table | None:
        """The summary; None where no detector ran."""
        return Table("Drift", HEADS, self._rows, NOTE) if self._rows else None

    def charts(self) -> list[Chart]:
        """The documents to draw: those with most re-masks, then most windows."""
        chosen = sorted(enumerate(self._charts), key=lambda c: (*c[1][:2], c[0]))[:TRACES]
        return [chart for _, (_, _, chart) in sorted(chosen, key=lambda c: c[0])]

    def _chart(self, cell: Cell, sample: dict[str, Any]) -> Chart:
        drift = sample["drift"]
        signal = [x if finite(x) else math.nan for x in drift["signal"]]
        alarms, remasks = ([x for x in drift.get(n) or [] if finite(x)] for n in ("alarms", "remasks"))
        threshold = t if finite(t := drift.get("threshold")) else None
        words = f"{len(signal)} windows of {drift['window']} tokens"
        if threshold is not None:
            words += f", {sum(x < threshold for x in signal)} of them below the threshold {threshold:.3f}"
        said = [listed([f"{x:g}" for x in tokens]) or "none" for tokens in (alarms, remasks)]
        words += f"; tokens with alarms: {said[0]}, with re-masks: {said[1]}"
        look = self._looks.get(cell.row.label, 0)
        return Chart(
            f"{sample['task']}, document {sample['doc_id']}", cell.name, words,
            lambda axes: trace(axes, signal, drift["window"], threshold, alarms, remasks, look),
        )  # fmt: skip
