"""The table of all numbers, with the command that makes each of them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dart_eval.results.report.cells import Cells
from dart_eval.results.report.text import finite, with_error
from dart_eval.results.tables import rows


@dataclass(frozen=True)
class Cell:
    """One field: what is read, and what is sorted by (a number, or the text itself)."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Row:
    """A row; `member` of a group (mmlu's subjects), hidden at first."""

    fields: list[Cell]
    command: str
    member: bool


def columns(cells: Cells) -> list[tuple[str, bool]]:
    """Heads, and whether the column is numbers."""
    heads = [("model", False)] if len(cells.models) > 1 else []
    return [*heads, ("task", False), ("metric", False), ("method", False), ("sparsity", True), ("value ± stderr", True),
            ("n", True), ("effective sparsity", True), ("weights read", True), ("re-masks", True)]  # fmt: skip


def body(cells: Cells) -> list[Row]:
    """One row per metric and cell, members of groups included."""
    own = {(r["key"], r["task"], r["metric"]) for r in rows(cells.records)}
    found = []
    for r in rows(cells.records, subtasks=True):
        arrow = {True: "", False: " ↓", None: " ·"}[r["higher_is_better"]]
        fields = [Cell(r["model"])] if len(cells.models) > 1 else []
        fields += [
            Cell(str(r["task"])), Cell(f"{r['metric']}{arrow}"), Cell(cells.labels[r["key"]]),
            _number(r["sparsity"], f"{r['sparsity']:g}"), _number(r["value"], with_error(r["value"], r["stderr"])),
            _number(r["n"], str(r["n"])), _share(r["effective_sparsity"]), _share(r["weights_read"]),
            _number(r["remasks"], str(r["remasks"])),
        ]  # fmt: skip
        member = (r["key"], r["task"], r["metric"]) not in own
        found.append(Row(fields, str(r.get("command") or ""), member))
    return found


def _number(value: Any, text: str) -> Cell:
    return Cell(text, float(value) if finite(value) else None)


def _share(value: Any) -> Cell:
    return _number(value, f"{value:.3f}" if finite(value) else "-")
