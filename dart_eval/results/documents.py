"""The documents of a cell, the metrics that follow from them, and one metric beside another cell's.

A cell's documents are a frame with a row for each document and filter. A metric of it has x and w of each document
(`sums.linearised`), its weight, the quality of guessing it, and the independent unit that it belongs to.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from dart_eval.results import stats, sums
from dart_eval.results.inputs import HASH_DIGITS
from dart_eval.results.metrics import DISTANCE, GOLD, kind_of
from dart_eval.results.record import Metric
from dart_eval.results.stats import Estimate, Share
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

INDEX = ["task", "doc_id", "filter"]
HASHES = {"documents": "doc_hash", "prompts": "prompt_hash"}
APART = ("metrics", "drift", "kl_bins")  # fields of a sample that are not columns
OF_DENSE_ITSELF = {"kl": 0.0, "top1": 1.0}  # distances that a dense cell does not store of itself, per position


class Unpaired(UserError):
    """Two cells have other documents or prompts."""


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric of a cell, document by document.

    Attributes:
        members: the tasks whose documents it covers: itself, or those of a group.
        index: [n] task, number and filter of each document.
        x, w: [n] its parts of the two sums.
        weight: [n] 1, or 1 / the size of its task where tasks weigh the same.
        chance: [n] the quality of guessing, if answers are right or wrong; 0 without choices.
        units: [n] its independent unit: a group's member, or the document's cluster, or the document.
        binary: whether every answer is either right or wrong.
    """

    metric: Metric
    members: tuple[str, ...]
    index: list[tuple[Any, ...]]
    x: np.ndarray
    w: np.ndarray
    weight: np.ndarray
    chance: np.ndarray
    units: list[str]
    binary: bool

    @property
    def name(self) -> tuple[str, str]:
        """Task, and metric with its filter."""
        return self.metric.task, self.metric.label

    @cached_property
    def sums(self) -> np.ndarray:
        """x and w of each document, weighted: [n, 2]."""
        return np.stack([self.x * self.weight, self.w * self.weight], 1)


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a cell.

    Attributes:
        documents: one row a document and filter.
        measures: by task and metric.
        left_out: names of metrics that do not follow from their documents' values.
    """

    documents: pd.DataFrame
    measures: Mapping[tuple[str, str], Measure]
    left_out: tuple[str, ...] = ()

    @cached_property
    def index(self) -> list[tuple[Any, ...]]:
        """Task, number and filter of each row."""
        return list(zip(*(self.documents[name].tolist() for name in INDEX), strict=True))


def answers(sample: Mapping[str, Any]) -> list[Any]:
    """Return a sample's responses, without the scores of its choices without their context (of acc_mutual_info)."""
    responses: list[Any] = sample["responses"]
    return responses[: len(responses) // 2] if "acc_mutual_info" in sample["metrics"] else responses


def documents(samples: Iterable[Json]) -> pd.DataFrame:
    """Return samples (`layout.Sample`) as a frame in the order of `INDEX`, with a column for each metric.

    Values stay as in the file: NaN is NaN. Of two lines on one document the last counts.
    """
    rows = {}
    for sample in samples:
        own = {name: value for name, value in sample.items() if name not in APART}
        rows[tuple(sample[name] for name in INDEX)] = {**own, **sample["metrics"], **own}  # no metric hides a hash
    index = sorted(rows)
    columns = dict.fromkeys([*INDEX, *HASHES.values(), "cluster", *(name for row in rows.values() for name in row)])
    # Objects: some names are not valid Unicode, which pandas' own type for text refuses.
    data = {name: pd.Series([rows[key].get(name) for key in index], dtype=object) for name in columns}
    return pd.DataFrame(data)


def answers_of(metrics: Sequence[Metric], samples: Sequence[Json]) -> Answers:
    """Return the answers of a record, with the metrics that follow from its documents."""
    frame = documents(_chosen(sample) for sample in samples)
    tasks = set(frame["task"])
    children: dict[str, set[str]] = {}
    for m in metrics:
        if m.part_of is not None:
            children.setdefault(m.part_of, set()).add(m.task)
    measures: dict[tuple[str, str], Measure] = {}
    left_out = []
    for m in (m for m in metrics if m.part_of is None and m.aggregation):
        measure = measured(m, tuple(sorted(_ends(m.task, children) & tasks)), frame)
        if measure is not None and _matches(sums.as_recorded(m.aggregation or "", measure.sums)[0], m.value):
            measures[measure.name] = measure
        else:
            left_out.append(f"{m.task} {m.label}")
    return Answers(frame, {**measures, **_further(measures, frame, {GOLD: True})}, tuple(left_out))


def _chosen(sample: Json) -> Json:
    """Replace a sample's responses by the number of choices and the chosen one, or by the text."""
    responses = answers(sample)
    several = len(responses) > 1 and all(isinstance(r, list) and r for r in responses)
    scores = [r[0] for r in responses] if several else []
    scores = scores if all(isinstance(score, (int, float)) for score in scores) else []
    is_text = len(responses) == 1 and isinstance(responses[0], str) and sample["filter"] == "none"  # nothing extracted
    return {
        **sample, "responses": None, "choices": len(scores), "text": responses[0] if is_text else None,
        "chosen": max(range(len(scores)), key=scores.__getitem__) if scores else None,
    }  # fmt: skip


def _ends(task: str, children: Mapping[str, set[str]]) -> set[str]:
    """Return the tasks of a group at any depth that are not groups, or the task itself."""
    below, ends, seen = [task], set[str](), set[str]()
    while below:
        last = below.pop()
        if last not in seen:  # a group that is its own member would go round for ever
            seen.add(last)
            below += children.get(last, ())
            ends |= set() if last in children else {last}
    return ends


def _matches(computed: float, recorded: float) -> bool:
    both_nan = math.isnan(computed) and math.isnan(recorded)
    return both_nan or math.isclose(computed, recorded, rel_tol=1e-6, abs_tol=1e-9)


def measured(metric: Metric, members: tuple[str, ...], frame: pd.DataFrame) -> Measure | None:
    """Return a metric with the documents that have a value for it; None if their values are not of its shape."""
    if metric.metric not in frame:
        return None
    columns = (frame[name].tolist() for name in (*INDEX, metric.metric, "cluster", "choices"))
    rows = [
        ((task, number, filter_), value, cluster, choices)
        for task, number, filter_, value, cluster, choices in zip(*columns, strict=True)
        if value is not None and task in members and filter_ == metric.filter  # NaN is a value
    ]
    try:
        values = np.array([value for _, value, *_ in rows])
    except ValueError:  # lists of several lengths
        return None
    if values.dtype.kind not in "biuf" or not rows:
        return None
    if values.ndim == 1 and (metric.aggregation == "mean" or metric.metric == "perplexity"):  # lm-eval's own perplexity
        values = np.stack([values, np.ones(len(values))], 1)
    elif metric.aggregation == "mean":
        return None
    if values.shape != (len(rows), 2):
        return None
    sizes = Counter(task for (task, *_), *_ in rows)
    weight = np.array([1 / sizes[i[0]] if metric.weights == "tasks" else 1.0 for i, *_ in rows])
    choices = np.array([count for *_, count in rows], float) * kind_of(metric.metric).chance
    chance = np.where(choices > 1, 1 / np.maximum(choices, 1), 0.0)
    group = members != (metric.task,)
    units = [i[0] if group else cluster or f"{i[0]} {i[1]}" for i, _, cluster, _ in rows]
    x, w = values.astype(float).T
    binary = metric.aggregation == "mean" and bool(np.isin(x, (0, 1)).all())
    return Measure(metric, members, [i for i, *_ in rows], x, w, weight, chance, units, binary)


def _further(
    measures: Mapping[tuple[str, str], Measure], frame: pd.DataFrame, names: Mapping[str, bool]
) -> dict[tuple[str, str], Measure]:
    """Return measures that no record names, of the documents of each task's first one. names: -> higher is better."""
    further = {}
    for first in reversed([*{m.metric.task: m for m in reversed([*measures.values()])}.values()]):
        for name, up in names.items():
            filter_ = "none" if name == GOLD else first.metric.filter
            own = first.metric
            metric = Metric(own.task, name, math.nan, None, 0, up, filter=filter_, weights=own.weights)
            measure = measured(metric, first.members, frame)
            if measure is not None and (name == GOLD or _all_have(frame, name, first.members)):
                further[measure.name] = measure
    return further


def _all_have(frame: pd.DataFrame, name: str, members: Sequence[str]) -> bool:
    """Whether every document of some tasks has a value: no share over the others stands for all."""
    return all(v is not None for task, v in zip(frame["task"], frame[name], strict=True) if task in members)


# -- distances from dense ----------------------------------------------------------------------------------------------


def add_distances(own: Answers, dense: Answers, texts: bool = True) -> Answers:
    """Add the distances of answers from dense's, as metrics of their tasks; both passed `check_paired`.

    `flips`: the chosen answer of an item differs. For texts `dense_rougeL`: ROUGE-L against dense's text, and
    `dense_tokens`: tokens before the first difference.
    """
    of = {"flips": ("chosen", lambda a, b: float(a != b))}
    if texts:
        of |= {"dense_rougeL": ("text", _similarity), "dense_tokens": ("token_ids", _common)}
    columns = {}
    for name, (column, distance) in of.items():
        sides = [side.documents[column] for side in (own, dense) if column in side.documents]
        if len(sides) == 2:
            values = [None if a is None or b is None else distance(a, b) for a, b in zip(*sides, strict=True)]
            columns[name] = pd.Series(values, own.documents.index, dtype=object)
    frame = own.documents.assign(**{name: column for name, column in columns.items() if column.notna().any()})
    further = _further(own.measures, frame, {name: name != "flips" for name in columns if name in frame})
    return replace(own, documents=frame, measures={**own.measures, **further})


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and most folders have no texts

    return RougeScorer(["rougeL"], use_stemmer=True)


def _similarity(ours: str, theirs: str) -> float:
    """Return ROUGE-L against dense's text; 1 for the same text, also where it has no word that ROUGE knows."""
    return 1.0 if ours == theirs else float(_scorer().score(theirs, ours)["rougeL"].fmeasure)


def _common(ours: Sequence[int], theirs: Sequence[int]) -> float:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return float(sum(1 for _ in same))


# -- one metric beside another cell's ----------------------------------------------------------------------------------


def check_paired(names: Sequence[str], limits: Sequence[object], a: Answers, b: Answers) -> None:
    """Refuse cells with other documents or prompts.

    Args:
        names: of the two cells, in words.
        limits: their `--limit`.

    Raises:
        Unpaired: names the difference.
    """
    what = f"{names[0]} and {names[1]} cannot be paired"
    sizes = [len({key[:2] for key in side.index}) for side in (a, b)]
    if sizes[0] != sizes[1]:
        of = [f"--limit {limit}" if limit else "no --limit" for limit in limits]
        said = " and ".join(f"{size} documents ({limit})" for size, limit in zip(sizes, of, strict=True))
        raise Unpaired(f"{what}: {said}", "run both with the same data and --limit")
    if a.index != b.index:
        raise Unpaired(f"{what}: they have other documents or filters", "run both with the same data")
    for name, column in HASHES.items():
        sides = ([digest[:HASH_DIGITS] for digest in side.documents[column].tolist()] for side in (a, b))
        other = [key for key, ours, theirs in zip(a.index, *sides, strict=True) if ours != theirs]
        if other:
            raise Unpaired(
                f"{what}: {len(other)} of {len(a.index)} {name} differ (the first: {other[0][0]} {other[0][1]})",
                "run both with the same data, few-shot examples, chat template and version of lm-eval",
            )


@dataclass(frozen=True, eq=False)
class Compared:
    """One metric under A, beside the same under B, on the same documents."""

    a: Measure
    b: Measure

    @property
    def metric(self) -> Metric:
        return self.a.metric

    @property
    def kind(self) -> str:
        return self.metric.aggregation or ""

    @cached_property
    def test(self) -> stats.Paired:
        """The paired test of A against B."""
        return stats.paired(self.kind, self.a.sums, self.b.sums, self.a.units, self.metric.higher_is_better)

    @cached_property
    def chances(self) -> np.ndarray:
        """The quality of guessing each document: 1 / choices if every answer is right or wrong, else unknown (NaN).

        A share of the probability, as of TruthfulQA's mc2, has a chance that no number of choices gives.
        """
        known = self.a.binary and self.b.binary
        return self.a.chance if known else np.where(self.a.chance > 0, np.nan, self.a.chance)

    @cached_property
    def chance(self) -> float | None:
        """The quality of guessing; None if unknown."""
        chance = float(np.average(self.chances, weights=self.a.weight))
        return None if np.isnan(chance) else chance

    @cached_property
    def _units(self) -> tuple[list[str], np.ndarray]:
        """Names of the independent units, and each document's place among them."""
        names = [f"{self.metric.task} {unit}" for unit in self.a.units]
        units, place = np.unique(names, return_inverse=True)
        return units.tolist(), place

    def estimate(self, side: Measure, above_chance: bool = True) -> Estimate:
        """Estimate the metric of A or B, above chance if it has one; for a perplexity its logarithm, in nats.

        Args:
            above_chance: whether 0 means guessing.
        """
        parts = side.sums
        if above_chance and self.kind == "mean":
            parts = parts - np.stack([self.chances * parts[:, 1], np.zeros(len(parts))], 1)
        value, slopes = sums.linearised(self.kind, parts)
        units, place = self._units
        return Estimate(value, dict(zip(units, np.bincount(place, slopes).tolist(), strict=True)))

    @cached_property
    def sides(self) -> tuple[Estimate, Estimate]:
        """A and B, each above chance."""
        return self.estimate(self.a), self.estimate(self.b)

    @cached_property
    def lost(self) -> Estimate:
        """By how much A is worse than B; negative if it is better. For perplexities in nats per word."""
        a, b = (self.estimate(side, above_chance=False) for side in (self.a, self.b))
        lost = b - a if self.metric.higher_is_better else a - b
        return lost.times(math.log(2)) if self.kind == "bits" else lost  # bits into nats

    @property
    def step(self) -> float:
        """Change of the value by one answer; 0 if answers are not right or wrong."""
        if self.a is self.b or not (self.a.binary and self.b.binary):
            return 0.0
        weights = self.a.sums[:, 1]
        return float(weights.max() / weights.sum())

    @cached_property
    def recovery(self) -> Share | None:
        """A's share of B's quality above chance; None if B's is not above noise.

        For perplexities it is B's / A's, for log-likelihoods exp of the difference. Distances from dense have none.
        """
        up, name = self.metric.higher_is_better, self.metric.metric
        if up is None or self.chance is None or kind_of(name).group == DISTANCE:
            return None
        if self.kind in ("log-perplexity", "bits") or name == GOLD:
            return self.lost.exp_minus()
        return stats.share(*(self.sides if up else self.sides[::-1]), self.step)


def against(a: Answers, b: Answers, dense: tuple[bool, bool] = (False, False)) -> list[Compared]:
    """Return every metric of A beside the same of B; both passed `check_paired`.

    Args:
        dense: whether A, and whether B, is a dense cell, whose distance from itself is known without being stored.
    """
    rows = []
    for name in dict.fromkeys([*a.measures, *b.measures]):
        ours, theirs = a.measures.get(name), b.measures.get(name)
        ours, theirs = _of_itself(ours, theirs, dense[0]), _of_itself(theirs, ours, dense[1])
        sides = [(m.members, m.index, m.metric.higher_is_better) for m in (ours, theirs) if m is not None]
        if ours is not None and theirs is not None and sides[0] == sides[1]:
            rows.append(Compared(ours, theirs))
    return rows


def _of_itself(own: Measure | None, other: Measure | None, dense: bool) -> Measure | None:
    """Return a measure, or if a dense cell lacks it its distance from itself, at the positions of the other cell."""
    if own is None and other is not None and dense and other.metric.metric in OF_DENSE_ITSELF:
        return replace(other, x=OF_DENSE_ITSELF[other.metric.metric] * other.w)
    return own
