"""What the numbers allow to say, in sentences: differences that are larger than their errors, and how many are not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from dart_eval.results.record import Metric, Record
from dart_eval.results.report.cells import PERPLEXITIES, Cells, find, main_metrics
from dart_eval.results.report.sentences import Comparison, comparisons_of, sentences_of
from dart_eval.results.report.text import finite, several, sparsity

_Pair = tuple[str, str, Metric, Metric]  # two labels and their numbers
MEAN = "the mean of"
ENOUGH = 30  # documents below which a normal interval means too little to say a sentence


@dataclass(frozen=True)
class Finding:
    """The sentences of one model and sparsity (who, and what can be said), the rule, and all comparisons as rows."""

    model: str
    sparsity: str
    sentences: list[tuple[str, str]]
    rule: str = ""
    comparisons: list[list[str]] = field(default_factory=list)


def findings(cells: Cells) -> list[Finding]:
    """One finding per model and sparsity.

    A difference counts if it exceeds z standard errors of the difference of two independent estimates, where z is the
    two-sided 5 % quantile divided by the number of comparisons of that finding (Bonferroni).
    """
    found: list[Finding] = []
    for model, s in sorted({(r.inputs["model"]["name"], r.inputs["sparsity"]) for r in cells.pruned}):
        here = [r for r in cells.pruned if (r.inputs["model"]["name"], r.inputs["sparsity"]) == (model, s)]
        made, left_out = _compare(cells, here)
        if not made:
            text = "Nothing can be said beyond the charts"
            why = f": every comparison has fewer than {ENOUGH} documents or no standard error." if left_out else (
                ": there is no dense cell and no second method to compare with.")  # fmt: skip
            if found and (found[-1].model, found[-1].sentences) == (model, [("", text + why)]):
                found[-1] = dataclasses.replace(found[-1], sparsity=f"{found[-1].sparsity}, {sparsity(s)}")
            else:
                found.append(Finding(model, sparsity(s), [("", text + why)]))
            continue
        z = NormalDist().inv_cdf(1 - 0.025 / len(made))
        sentences = sentences_of(made, z)
        if left_out:
            why = f"left out: fewer than {ENOUGH} documents or no standard error."
            sentences.append(("", f"{several(left_out, 'comparison')} {why}"))
        rule = f"{several(len(made), 'comparison')}, a difference counts beyond {z:.2f} of its standard errors"
        found.append(Finding(model, sparsity(s), sentences, rule, comparisons_of(made, z)))
    return found


def _compare(cells: Cells, records: Sequence[Record]) -> tuple[list[Comparison], int]:
    made, left_out = [], 0
    ordered = sorted(records, key=lambda r: (cells.labels[r.key], str(r.inputs["task"]), r.key))
    candidates: list[_Pair] = []
    for r in ordered:
        for m in main_metrics(r):
            other = find(cells.dense(r), m)
            if other is not None:
                candidates.append((cells.labels[r.key], "dense", m, other))
    for r, q in itertools.combinations(ordered, 2):
        if r.inputs["task"] == q.inputs["task"] and cells.dense(r) is cells.dense(q):
            for m in main_metrics(r):
                other = find(q, m)
                if other is not None and cells.labels[r.key] != cells.labels[q.key]:
                    candidates.append((cells.labels[r.key], cells.labels[q.key], m, other))
    for first, second, a, b in [*candidates, *_means(candidates)]:
        z = _z(a, b)
        if z is None:
            left_out += 1
        else:
            made.append(Comparison(first, second, a.task, a, b, z, a.task.startswith(MEAN)))
    return made, left_out


def _means(candidates: Sequence[_Pair]) -> list[_Pair]:
    """The same over the tasks that share a metric: their mean, whose error is smaller than each task's."""
    groups: dict[tuple[str, str, str], list[_Pair]] = {}
    for pair in candidates:
        if pair[2].metric not in PERPLEXITIES and _z(*pair[2:]) is not None:
            groups.setdefault((pair[0], pair[1], pair[2].metric), []).append(pair)
    return [(first, second, _mean([p[2] for p in pairs]), _mean([p[3] for p in pairs]))
            for (first, second, _), pairs in groups.items() if len(pairs) > 1]  # fmt: skip


def _mean(metrics: Sequence[Metric]) -> Metric:
    k = len(metrics)
    return Metric(
        f"{MEAN} {k} tasks", metrics[0].metric, sum(m.value for m in metrics) / k,
        math.hypot(*(m.stderr or 0.0 for m in metrics)) / k, min(m.n for m in metrics), metrics[0].higher_is_better,
    )  # fmt: skip


def _z(a: Metric, b: Metric) -> float | None:
    """Standard errors by which `a` is better than `b`; perplexities by their logarithms; None if it means nothing."""
    if min(a.n, b.n) < ENOUGH or not all(finite(x) for x in (a.value, b.value, a.stderr, b.stderr)):
        return None
    assert a.stderr is not None and b.stderr is not None
    if a.metric in PERPLEXITIES and a.metric != "bits_per_byte":
        if min(a.value, b.value) <= 0:
            return None
        difference = math.log(a.value / b.value)
        error = math.hypot(a.stderr / a.value, b.stderr / b.value)
    else:
        difference, error = a.value - b.value, math.hypot(a.stderr, b.stderr)
    if error <= 0:
        return None
    return (difference if a.higher_is_better else -difference) / error
