"""What the numbers allow to say: paired tests of each pruned method against dense, and of the best against the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dart_eval.results import outcomes, stats
from dart_eval.results.outcomes import Outcome
from dart_eval.results.record import Metric, Record
from dart_eval.results.report.cells import Cells, find, main_metrics, question
from dart_eval.results.report.sentences import Comparison, Untested, against_dense, best, left_out, rows, unreachable
from dart_eval.results.report.text import finite, several, sparsity

NOTHING = "There is no dense cell and no second method to compare with."


@dataclass(frozen=True)
class Finding:
    """What can be said of one model and sparsity.

    Attributes:
        groups: (head, sentences), each sentence as (who, what).
        notes: what could not be tested, and why.
        rule: how many comparisons there are. comparisons: all of them, as rows of a table.
    """

    model: str
    sparsity: str
    groups: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rule: str = ""
    comparisons: list[list[str]] = field(default_factory=list)


class Findings:
    """Tests cells as their samples go by, so that those of one task only are held at a time."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._made: dict[tuple[str, float], list[Comparison]] = {}
        self._untested: dict[tuple[str, float], list[Untested]] = {}

    def add(self, records: Sequence[Record], found: Mapping[str, Outcome]) -> None:
        """Test all cells of one model and task. found: key -> outcome, of cells whose samples could be read."""
        groups: dict[tuple[str, float], list[Record]] = {}
        for r in records:
            if r.inputs["method"] != outcomes.DENSE:
                groups.setdefault((question(r), r.inputs["sparsity"]), []).append(r)
        for (_, level), rivals in groups.items():
            place = rivals[0].inputs["model"]["name"], level
            rivals.sort(key=lambda r: (self._cells.labels[r.key], r.key))
            for r in rivals:
                dense = self._cells.dense(r)
                for m in main_metrics(r) if dense is not None else ():
                    if dense is not None and find(dense, m) is not None:
                        self._test(place, r, dense, m, found)
            for m in main_metrics(rivals[0]):
                self._among(place, rivals, m, found)

    def _among(
        self, place: tuple[str, float], rivals: Sequence[Record], m: Metric, found: Mapping[str, Outcome]
    ) -> None:
        """The best of these methods against each of the others.

        It is chosen by the values that are then tested. Counting each p for all pairs that could have been chosen
        (Bonferroni: K (K - 1) / 2 pairs are K / 2 for each of the K - 1 that are tested) pays for that.
        """
        values = [(r, own.value) for r in rivals if (own := find(r, m)) is not None and finite(own.value)]
        if len(values) < 2:
            return
        first = max(values, key=lambda v: v[1] if m.higher_is_better else -v[1])[0]  # of equal ones, the first
        for other, _ in values:
            if self._cells.labels[other.key] != self._cells.labels[first.key]:
                self._test(place, first, other, m, found, len(values) / 2)

    def _test(
        self, place: tuple[str, float], a: Record, b: Record, m: Metric, found: Mapping[str, Outcome],
        choices: float | None = None,
    ) -> None:  # fmt: skip
        first, second = self._cells.labels[a.key], self._cells.labels[b.key]
        result = _contrast(a, b, m, found)
        if isinstance(result, str):
            self._untested.setdefault(place, []).append(Untested(first, second, m.task, result))
        else:
            made = Comparison(first, second, m.task, m.metric, bool(m.higher_is_better), result, choices)
            self._made.setdefault(place, []).append(made)

    def made(self) -> list[Finding]:
        """One finding per model and sparsity; p's are adjusted by Holm over all comparisons of a finding."""
        found: list[Finding] = []
        for place in sorted({(r.inputs["model"]["name"], r.inputs["sparsity"]) for r in self._cells.pruned}):
            one = _finding(place, self._made.get(place, []), self._untested.get(place, []))
            last = found[-1] if found else None
            if last is not None and not one.groups and dataclasses.replace(one, sparsity=last.sparsity) == last:
                found[-1] = dataclasses.replace(last, sparsity=f"{last.sparsity}, {one.sparsity}")
            else:
                found.append(one)
        return found


def _finding(place: tuple[str, float], made: Sequence[Comparison], untested: Sequence[Untested]) -> Finding:
    tested = _adjusted(made)
    groups = [
        ("Against dense", against_dense([c for c in tested if c.choices is None])),
        ("The best pruned method of each task, against the others", best([c for c in tested if c.choices is not None])),
    ]
    notes = [*left_out(untested), *unreachable(tested)]
    rule = f"All {several(len(tested), 'comparison')}" if len(tested) > 1 else "The comparison"
    return Finding(
        place[0], sparsity(place[1]), [g for g in groups if g[1]], notes or ([] if tested else [NOTHING]),
        rule if tested else "", rows(tested),
    )  # fmt: skip


def _adjusted(made: Iterable[Comparison]) -> list[Comparison]:
    made = sorted(made, key=lambda c: c.choices is not None)  # stable: with dense first
    counted = [min(1.0, (c.choices or 1) * c.p) for c in made]
    return [dataclasses.replace(c, p_holm=p) for c, p in zip(made, stats.holm(counted), strict=True)]


def _contrast(a: Record, b: Record, m: Metric, found: Mapping[str, Outcome]) -> stats.Paired | str:
    """The paired test, or why there is none."""
    x, y = found.get(a.key), found.get(b.key)
    if x is None or y is None or not (x.documents and y.documents):
        return "samples are missing or damaged, or hold NaN or infinity"
    try:
        outcomes.check_paired(_cell(a, x), x, _cell(b, y), y)
    except outcomes.Unpaired as error:
        return f"not paired, {error.problem.partition('cannot be paired: ')[2]}"
    measure = next((n for n in x.measures if (n.task, n.metric) == (m.task, m.metric)), None)
    result = outcomes.contrast(measure, x, y) if measure is not None and measure in y.measures else None
    if result is None:
        return f"{m.metric} does not follow from the values of single documents"
    return result if result.p is not None else result.reason


def _cell(record: Record, found: Outcome) -> outcomes.Cell:
    return outcomes.Cell(record.key, record.inputs, "", record.created, lambda: found)
