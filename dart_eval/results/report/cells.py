"""The records of a report, with what every section asks of them: names, styles, and which cell is whose dense one."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dart_eval.results import inputs, metrics
from dart_eval.results.labels import labels, specs
from dart_eval.results.outcomes import DENSE
from dart_eval.results.record import Metric, Record
from dart_eval.results.report.text import finite, sparsity

BUILD = ("code", "versions")  # preferred equal, but a report of mixed versions still compares (and warns)


@dataclass(frozen=True)
class Cells:
    """All records of a folder, in a fixed order."""

    records: tuple[Record, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Cells:
        """Sorted, so that the page does not depend on when a cell was finished."""

        def order(r: Record) -> tuple[object, ...]:
            i = r.inputs
            return i["model"]["name"], str(i["task"]), i["method"] != DENSE, i["sparsity"], i["method"], r.key

        return cls(tuple(sorted(records, key=order)))

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """Key -> the cell's name without its sparsity, and without what only follows from its task."""
        return labels(self.records, by_task=True)

    @functools.cached_property
    def methods(self) -> list[str]:
        """Methods as they were typed."""
        return sorted(set(specs(self.records).values()))

    @functools.cached_property
    def styles(self) -> dict[str, int]:
        """Label -> number of its look, the same in all charts; dense has a look of its own."""
        names = sorted({self.labels[r.key] for r in self.pruned})
        return {name: i for i, name in enumerate(names)}

    @functools.cached_property
    def pruned(self) -> tuple[Record, ...]:
        """The cells that are not dense."""
        return tuple(r for r in self.records if r.inputs["method"] != DENSE)

    @functools.cached_property
    def models(self) -> list[str]:
        """Names of models."""
        return sorted({r.inputs["model"]["name"] for r in self.records})

    def name(self, record: Record) -> str:
        """The cell's name: method, what sets it apart, sparsity."""
        label = self.labels[record.key]
        return label if record.inputs["method"] == DENSE else f"{label} {sparsity(record.inputs['sparsity'])}"

    def dense(self, record: Record) -> Record | None:
        """The dense cell that was asked the same, best of the same code and versions."""
        found = self._dense.get(question(record), [])
        exact = [r for r in found if all(r.inputs.get(b) == record.inputs.get(b) for b in BUILD)]
        return next(iter(exact or found), None)

    @functools.cached_property
    def _dense(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for r in self.records:
            if r.inputs["method"] == DENSE:
                found.setdefault(question(r), []).append(r)
        return found


def question(record: Record) -> str:
    """What was asked of which model, apart from how it was pruned: cells that agree in it can be compared."""
    return inputs.question(record.inputs)


def main_metrics(record: Record) -> list[Metric]:
    """The one number of each task that was asked for: members of groups stay out."""
    return sorted(metrics.main(m for m in record.metrics if m.part_of is None), key=lambda m: m.task)


def find(record: Record | None, like: Metric) -> Metric | None:
    """The record's number of the same task and metric."""
    if record is None:
        return None
    return next((m for m in record.metrics if (m.task, m.metric) == (like.task, like.metric)), None)


def half_width(m: Metric) -> float | None:
    """Half of the 95 % interval, where there is one."""
    return 1.96 * m.stderr if finite(m.stderr) else None


def unique(values: Iterable[object]) -> list[str]:
    """Distinct values as text, sorted; numbers by size."""
    found: Sequence[object] = list({json.dumps(v, sort_keys=True, default=str): v for v in values}.values())
    numbers = all(isinstance(v, (int, float)) for v in found)
    return [str(v) for v in (sorted(found) if numbers else sorted(found, key=str))]  # type: ignore[type-var]
