"""The frame of comparisons: every metric of a cell beside the same metric of another, on the same documents.

Board, `compare`, `check`, the tables of a paper and `tables --format csv` are views of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dart_eval.results import distance, metrics, outcomes, pairing, stats
from dart_eval.results.estimates import Estimate, Share, share
from dart_eval.results.outcomes import Cell, Measure, Pairs
from dart_eval.results.record import Record
from dart_eval.results.rows import rows as rows_of
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json


@dataclass(frozen=True)
class Compared:
    """One metric of a task under A, beside B."""

    a: Cell
    b: Cell
    pairs: Pairs

    @property
    def measure(self) -> Measure:
        return self.pairs.measure

    @cached_property
    def test(self) -> stats.Paired:
        """The paired test of A against B."""
        return stats.paired(self.measure.kind, *self.pairs[1:5], self.measure.higher_is_better)

    @cached_property
    def chance(self) -> float | None:
        """The quality of guessing; None if unknown."""
        weights = self.pairs.weights
        found = float(np.average(self.pairs.chance, weights=weights))
        return None if np.isnan(found) else found

    @cached_property
    def _units(self) -> tuple[list[str], np.ndarray]:
        """Names of the independent units, and each document's place among them."""
        names, place = np.unique([f"{self.measure.task} {unit}" for unit in self.pairs.units], return_inverse=True)
        return names.tolist(), place

    def estimate(self, values: np.ndarray, above_chance: bool = True) -> Estimate:
        """Estimate the metric from values, above chance if it has one; for a perplexity its logarithm, in nats.

        Args:
            values: of A or of B, from `pairs`.
            above_chance: whether 0 means guessing.
        """
        weights = np.ones(len(values)) if self.pairs.weights is None else self.pairs.weights
        if above_chance and values.ndim == 1:
            values = values - self.pairs.chance
        value, slopes = stats.KINDS[self.measure.kind](values, weights)
        names, place = self._units
        return Estimate(value, dict(zip(names, np.bincount(place, slopes).tolist(), strict=True)))

    @cached_property
    def sides(self) -> tuple[Estimate, Estimate]:
        """A and B, each above chance."""
        return self.estimate(self.pairs.a), self.estimate(self.pairs.b)

    @cached_property
    def lost(self) -> Estimate:
        """By how much A is worse than B; negative if it is better. For perplexities in nats per word."""
        a, b = (self.estimate(values, above_chance=False) for values in (self.pairs.a, self.pairs.b))
        lost = b - a if self.measure.higher_is_better else a - b
        return lost.times(math.log(2)) if self.measure.kind == "bits" else lost  # bits into nats

    @property
    def step(self) -> float:
        """Change of the value by one answer; 0 if answers are not right or wrong."""
        values, weights = (self.pairs.a, self.pairs.b), self.pairs.weights
        if self.a is self.b or self.measure.kind != "mean" or not all(np.isin(v, (0, 1)).all() for v in values):
            return 0.0
        return 1 / len(values[0]) if weights is None else float(weights.max() / weights.sum())

    @cached_property
    def recovery(self) -> Share | None:
        """A's share of B's quality above chance; None if B's is not above noise.

        For perplexities it is B's / A's, for log-likelihoods exp of the difference. Distances from dense have none.
        """
        of = self.measure
        if of.higher_is_better is None or self.chance is None or metrics.kind_of(of.name).group == metrics.DISTANCE:
            return None
        if of.kind in ("log-perplexity", "bits") or of.name == metrics.GOLD:
            return self.lost.exp_minus()
        return share(*(self.sides if of.higher_is_better else self.sides[::-1]), self.step)


def compared(pair: pairing.Pair, wanted: Iterable[Measure]) -> list[Compared]:
    """Return the rows of a pair of cells, without measures that do not follow from the documents of both."""
    measured = (pair.measured(measure) for measure in wanted)
    return [Compared(pair.a, pair.b, pairs) for pairs in measured if pairs is not None]


def beside_dense(cells: Sequence[Cell]) -> tuple[dict[str, list[Compared]], list[str]]:
    """Compare every metric of cells with their dense one, by key; return also why some are missing.

    Args:
        cells: of a folder, dense ones among them, with their distances from dense (`distance.beside_dense`).
    """
    dense = pairing.dense_cells(cells)
    rows: dict[str, list[Compared]] = {}
    problems: dict[str, None] = {}
    alone: dict[str, None] = {}
    for cell in cells:
        reference = pairing.dense_of(cell, dense)
        if reference is None:
            alone[str(cell.inputs["task"])] = None
            continue
        try:
            found = pairing.pair(cell, reference)
        except UserError as error:
            problems[f"Not compared with dense: {error.problem}."] = None
            continue
        rows[cell.key] = compared(found, found.x.measures)
    if alone:
        problems[f"There is no dense cell for {', '.join(alone)}: run --method dense too, for recoveries."] = None
    return rows, list(problems)


def lines(store: Store, records: Sequence[Record], subtasks: bool = False) -> list[dict[str, object]]:
    """Return one row per cell and metric: its value, dense's on the same documents, and their comparison.

    Beside the columns of `rows` there are `dense`, `chance` (the quality of guessing), `recovery` (the share of dense's
    quality above chance) with its interval `recovery_low` and `recovery_high`, `difference` (of perplexities, of their
    logarithms) with `low` and `high`, `p` (two-sided, paired) and `p_holm`, over the tasks of one method and metric.

    Args:
        store: the folder, for samples.
        records: its cells.
        subtasks: whether to include the members of groups.
    """
    cells = [outcomes.cell_of(store, record) for record in records]
    return lines_of(distance.beside_dense(cells), records, subtasks)


def lines_of(cells: Sequence[Cell], records: Sequence[Record], subtasks: bool = False) -> list[dict[str, object]]:
    """Return `lines` of cells that have their distances from dense. records: of the same cells."""
    found, _ = beside_dense(cells)
    made = rows_of(records, subtasks)
    tests = {(key, row.measure.task, row.measure.metric): row for key, some in found.items() for row in some}
    made += _distances(made, tests)
    families: dict[tuple[object, ...], dict[object, list[Json]]] = {}
    for line in made:
        line.update(dict.fromkeys(("dense", "chance", "recovery", "recovery_low", "recovery_high", "difference", "low",
                                   "high", "p", "p_holm")))  # fmt: skip
        row = tests.get((line["key"], line["task"], line["metric"]))
        if row is None:
            continue
        ends = (row.recovery and row.recovery.interval) or (None, None)
        line.update(
            dense=row.test.value_b, chance=row.chance, recovery=row.recovery.value if row.recovery else None,
            recovery_low=ends[0], recovery_high=ends[1], difference=row.test.difference, low=row.test.low,
            high=row.test.high, p=row.test.p,
        )  # fmt: skip
        family = (line["model"], line["label"], line["sparsity"], line["scope"], line["metric"])
        families.setdefault(family, {}).setdefault(line["task"], []).append(line)
    for tasks in families.values():
        for i in range(max(map(len, tasks.values()))):
            # Each task counts once; one that was repeated less often counts with its last run.
            some = [runs[min(i, len(runs) - 1)] for runs in tasks.values()]
            for line, p in zip(some, stats.holm([line["p"] for line in some]), strict=True):
                line["p_holm"] = p if line["p_holm"] is None else line["p_holm"]
    return made


def _distances(
    lines: Sequence[dict[str, object]], tests: Mapping[tuple[str, str, str], Compared]
) -> list[dict[str, object]]:
    """Return the lines of distances from dense that records lack.

    Args:
        lines: of the records.
        tests: key, task and metric -> the row.
    """
    known = {(line["key"], line["task"], line["metric"]) for line in lines}
    like = {(line["key"], line["task"]): line for line in reversed(lines)}
    made = []
    for (key, task, metric), row in tests.items():
        if metrics.kind_of(metric).group == metrics.DISTANCE and (key, task, metric) not in known:
            stderr = row.sides[0].stderr
            number = {"metric": metric, "value": row.test.value_a, "stderr": stderr, "n": row.test.n}
            made.append({**like[key, task], **number, "higher_is_better": row.measure.higher_is_better})
    return made
