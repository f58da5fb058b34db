"""The report of a results folder, section by section, in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dart_eval.results.report import charts, cost, head, page, quality, rows
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.samples import Samples
from dart_eval.results.report.text import listed
from dart_eval.results.store import Store


@dataclass(frozen=True)
class Report:
    """The page and what is in it."""

    html: str
    cells: int
    samples: int


def build(store: Store, title: str | None = None, documents: int = 50) -> Report:
    """The report of the records in `store`. Equal folders give equal bytes.

    Args:
        store: a folder of finished cells; samples and texts may be missing.
        title: head of the page; without it, the models' names.
        documents: documents of each task in the sample explorer; 0 leaves it out.

    Raises:
        UserError: no record that can be read.
    """
    found = store.scan()
    found.tell()
    cells = Cells.of(found.records)
    samples = Samples(store, cells, documents)
    drawn = _Drawn()
    data = samples.explorer.data()
    models = [_model(cells, model, samples.chance, drawn) for model in cells.models]
    table = rows.body(cells)
    context = {
        "title": title or f"Pruning evaluation of {listed(cells.models, 4)}",
        "facts": head.facts(cells), "warnings": [*head.warnings(cells), *head.unread(list(found.unread), samples)],
        "findings": samples.findings.made(),
        "cells": len(cells.records), "models": models, "several_models": len(models) > 1,
        "styles": cells.styles, "key": drawn.key,
        "has_dense": len(cells.pruned) < len(cells.records), "has_pruned": bool(cells.pruned),
        "has_chance": bool(samples.chance), "executions": sorted({str(r.inputs.get("execution"))
                                                                  for r in cells.records}),
        "ceilings": cost.ceilings(cells), "memory": cost.memory(cells),
        "traces": [drawn.trace(t) for t in samples.drift.traces],
        "trace_styles": {t.style for t in samples.drift.traces}, "drift": samples.drift,
        "columns": rows.columns(cells), "rows": table, "members": sum(r.member for r in table),
        "commands": any(r.command for r in table), "explorer": samples.explorer, "documents": sum(
            len(t["documents"]) for t in data["tasks"]),
    }  # fmt: skip
    html = page.render(context, data if data["tasks"] else None)
    return Report(html, len(cells.records), samples.explorer.samples)


def _model(cells: Cells, name: str, chance: dict[str, float], drawn: _Drawn) -> dict[str, Any]:
    """The charts of one model, each group with the series that its legend needs."""
    groups = quality.against_sparsity(cells, name, chance)
    costs = quality.against_cost(cells, name)
    return {
        "name": name,
        "groups": [
            {"title": g.title, "kinds": g.kinds, "styles": g.styles, "charts": [drawn.sparsity(p) for p in g.panels]}
            for g in groups
        ],
        "costs": [drawn.cost(p) for p in costs],
        "cost_styles": {line.style for p in costs for line in p.lines},
    }


class _Drawn:
    """Draws charts, and gives each the prefix that keeps its ids its own."""

    def __init__(self) -> None:
        self._count = 0

    def sparsity(self, panel: quality.Panel) -> dict[str, Any]:
        return self._figure(panel, charts.against_sparsity(panel.lines, panel.levels, panel.log, self._prefix()))

    def cost(self, panel: quality.Panel) -> dict[str, Any]:
        return self._figure(panel, charts.cost_quality(panel.lines, panel.tops, self._prefix()))

    def trace(self, t: Any) -> dict[str, Any]:
        return self._figure(t, charts.trace(t.signal, t.window, t.threshold, t.remasks, t.style, self._prefix()))

    def key(self, style: int | None, kind: str = "line") -> Markup:
        return Markup(charts.key(style, kind, self._prefix()))

    def _prefix(self) -> str:
        self._count += 1
        return f"c{self._count}"

    def _figure(self, panel: Any, svg: str) -> dict[str, Any]:
        return {"title": panel.title, "note": panel.note, "words": panel.words, "svg": Markup(svg)}
