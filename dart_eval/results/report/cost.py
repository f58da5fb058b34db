"""What pruning saves at most, and what it costs in memory: tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dart_eval.results.record import Record
from dart_eval.results.report.cells import DENSE, Cells
from dart_eval.results.report.quality import decode_share, pruned_share
from dart_eval.results.report.text import finite, percent, size, span, sparsity


def _by_method(cells: Cells, records: Sequence[Record]) -> list[tuple[str, str, str, list[Record]]]:
    """(model, label, sparsity) and its cells over tasks."""
    groups: dict[tuple[str, float, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r.inputs["model"]["name"], r.inputs["sparsity"], cells.labels[r.key]), []).append(r)
    return [
        (model, label, "-" if all(r.inputs["method"] == DENSE for r in found) else sparsity(s), found)
        for (model, s, label), found in sorted(groups.items())
    ]


def ceilings(cells: Cells) -> list[dict[str, str]]:
    """FLOPs per decoded token and the speed-up that they allow at most, per model, method and sparsity."""
    rows = []
    for model, label, s, records in _by_method(cells, cells.pruned):
        shares = [x for r in records if (x := pruned_share(r)) is not None]
        if not shares:
            continue
        rows.append({
            "model": model, "label": label, "sparsity": s,
            "share": span(shares, lambda v: percent(v, 1)),
            "saved": span([1 - x for x in shares], lambda v: f"{v:.3f}"),
            "ceiling": span([1 / x for x in shares], lambda v: f"{v:.2f}×"),
            "with": span([1 / x for r in records if (x := decode_share(r))], lambda v: f"{v:.2f}×"),
            "added": span([r.flops.get("overhead_share", 0.0) for r in records], lambda v: percent(v, 3)),
            "read": span([r.weights_read for r in records], lambda v: f"{v:.3f}"),
        })  # fmt: skip
    return rows


def memory(cells: Cells) -> list[dict[str, Any]]:
    """Bytes of weights, of a method's state per sequence and at the peak, with the length of a bar for each."""
    grouped = _by_method(cells, cells.records)
    states = [_most(records, lambda r: r.memory.get("state")) for *_, records in grouped]
    peaks = [_most(records, lambda r: r.measured.get("peak")) for *_, records in grouped]
    rows = []
    for (model, label, s, records), state, peak in zip(grouped, states, peaks, strict=True):
        weights = _most(records, lambda r: r.memory.get("weights"))
        rows.append({
            "model": model, "label": label, "sparsity": s, "weights": size(weights),
            "state": span((r.memory.get("state") for r in records), size), "state_bar": _bar(state, states),
            "of_weights": percent(state / weights, 3) if weights else "-",
            "peak": span((r.measured.get("peak") for r in records), size), "peak_bar": _bar(peak, peaks),
        })  # fmt: skip
    return rows


def _most(records: Sequence[Record], value: Callable[[Record], Any]) -> float:
    return max([v for r in records if finite(v := value(r))], default=0.0)


def _bar(value: float, beside: Sequence[float]) -> str:
    return f"{100 * value / max(beside):.1f}" if beside and max(beside) > 0 else "0"
