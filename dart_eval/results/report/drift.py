"""The drift detectors' results: a summary of each cell, and charts of a few documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.results.format import finite
from dart_eval.results.report.cells import ReportCell
from dart_eval.results.report.charts import Chart, Line, Point
from dart_eval.results.report.head import listed
from dart_eval.results.report.reader import CellSamples
from dart_eval.results.writers import Table

TRACES = 6  # documents drawn
PER_CELL = 2  # at most of one cell
HEADS = ["task", "method", "documents traced", "windows", "below threshold", "alarms", "re-masks", "per 1000 tokens"]
NOTE = (
    "A document has a trace if a window filled up after its mask was made. Re-masks are counted over all tokens of the "
    "cell. After a re-mask a detector may compare with newer windows: a jump there is no sign of better answers."
)


@dataclass(frozen=True)
class Drift:
    """The summary, the documents to draw, and the number of traced ones."""

    table: Table
    charts: list[Chart]
    documents: int


def drift_of(
    cells: Sequence[ReportCell], samples_of: Mapping[str, CellSamples], looks: Mapping[str, int]
) -> Drift | None:
    """Return the section; None if no window closed. It draws documents with many re-masks and windows."""
    found = [(c, seen) for c in cells if (seen := samples_of.get(c.record.key)) is not None and seen.traced]
    if not found:
        return None
    drawn = []
    for i, (cell, seen) in enumerate(found):
        long = [s for s in seen.traced if sum(map(finite, s["drift"]["signal"])) > 1]
        drawn += [(_size(s), i, s["doc_id"], cell, s) for s in sorted(long, key=_size)[:PER_CELL]]
    chosen = sorted(sorted(drawn, key=lambda d: d[:3])[:TRACES], key=lambda d: (d[1], d[0], d[2]))
    return Drift(
        Table("Drift", HEADS, [_row(cell, seen) for cell, seen in found], NOTE),
        [_chart(cell, s, looks.get(cell.row.label, 0)) for *_, cell, s in chosen],
        sum(len(seen.traced) for _, seen in found),
    )


def _size(sample: Mapping[str, Any]) -> tuple[int, int]:
    return -len(sample["drift"].get("remasks") or []), -len(sample["drift"]["signal"])


def _row(cell: ReportCell, seen: CellSamples) -> list[str]:
    record, windows, below, alarms = cell.record, 0, 0, 0
    for s in seen.traced:
        signal = [x for x in s["drift"]["signal"] if finite(x)]
        windows += len(signal)
        below += sum(x < t for x in signal) if finite(t := s["drift"].get("threshold")) else 0
        alarms += len(s["drift"].get("alarms") or [])
    return [
        str(record.inputs["task"]), cell.name, f"{len(seen.traced)} of {seen.samples}", str(windows),
        f"{100 * below / windows:.1f} %" if windows else "-", str(alarms), str(record.remasks),
        f"{1000 * record.remasks / record.tokens:.2f}" if record.tokens else "-",
    ]  # fmt: skip


def _chart(cell: ReportCell, sample: Mapping[str, Any], look: int) -> Chart:
    drift, window = sample["drift"], sample["drift"]["window"]
    alarms, remasks = ([x for x in drift.get(n) or [] if finite(x)] for n in ("alarms", "remasks"))
    points = [Point(cell.row.read, x, x, x, f"tokens up to {window * i:g}: cosine {x:.3f}", window * i)
              for i, x in enumerate(drift["signal"], 1) if finite(x)]  # fmt: skip
    note = f"{cell.name}; {len(drift['signal'])} windows of {window:g} tokens"
    across = []
    if finite(threshold := drift.get("threshold")):
        note += f", {sum(p.value < threshold for p in points)} of them below the threshold {threshold:.3f}"
        across = [("threshold", threshold, threshold, threshold)]
    said = [listed([f"{x:g}" for x in tokens]) or "none" for tokens in (alarms, remasks)]
    note += f"; tokens with alarms: {said[0]}, with re-masks: {said[1]}"
    return Chart(
        f"{sample['task']}, document {sample['doc_id']}", note, [Line(cell.row.label, points, look)],
        (0.0, 1.03 * max([window * len(drift["signal"]), *alarms, *remasks])), (), across,
        [*(("alarm", x) for x in alarms), *(("remask", x) for x in remasks)], "scored or generated token",
    )  # fmt: skip
