"""The documents of a cell, the metrics that follow from them, and one metric beside another cell's.

A cell's documents are a frame with a row for each document and filter. A metric of it has x and w of each document
(`sums.linearised`), its weight, the quality of guessing it, and the independent unit that it belongs to.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dart_eval.results import stats, sums
from dart_eval.results.metrics import DISTANCE, GOLD, kind_of
from dart_eval.results.record import Metric
from dart_eval.results.stats import Estimate, Share
from dart_eval.util.text import Json

INDEX = ["task", "doc_id", "filter"]
HASHES = ["doc_hash", "prompt_hash"]
LOOP = 20  # tokens; a shorter phrase that goes on and on is a run of as many, too
APART = ("metrics", "drift", "kl_bins")  # fields of a sample that are not columns


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric of a cell, document by document.

    Attributes:
        members: the tasks whose documents it covers: itself, or those of a group.
        index: [n] task, number and filter of each document (`INDEX`).
        x, w: [n] its parts of the two sums.
        weight: [n] 1, or 1 / the size of its task where tasks weigh the same.
        chance: [n] the quality of guessing; 0 without choices, and NaN where answers are not right or wrong: a share of
            the probability, as of TruthfulQA's mc2, has a chance that no number of choices gives.
        units: [n] its independent unit: the task, and a group's member, the document's cluster, or the document.
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


class Answers(NamedTuple):
    """The answers of a cell.

    Attributes:
        documents: one row a document and filter, by which the rows are named (`INDEX`).
        measures: by task and metric.
        left_out: names of metrics that do not follow from their documents' values.
    """

    documents: pd.DataFrame
    measures: Mapping[tuple[str, str], Measure]
    left_out: tuple[str, ...] = ()


def answers(sample: Mapping[str, Any]) -> list[Any]:
    """Return a sample's responses, without the scores of its choices without their context (of acc_mutual_info)."""
    responses: list[Any] = sample["responses"]
    return responses[: len(responses) // 2] if "acc_mutual_info" in sample["metrics"] else responses


def documents(samples: Iterable[Json]) -> pd.DataFrame:
    """Return samples (`record.Sample`) as a frame with sorted rows, named by `INDEX`, and a column for each metric.

    Values stay as in the file: NaN is NaN. Of two lines on one document the last counts.
    """
    rows = {}
    for sample in samples:
        own = {name: value for name, value in sample.items() if name not in APART}
        rows[tuple(sample[name] for name in INDEX)] = {**own, **sample["metrics"], **own}  # no metric hides a hash
    index = sorted(rows)
    columns = dict.fromkeys([*INDEX, *HASHES, "cluster", *(name for row in rows.values() for name in row)])
    # Objects: some names are not valid Unicode, which pandas' own type for text refuses.
    data = {name: [rows[key].get(name) for key in index] for name in columns}
    return pd.DataFrame(data, pd.Index(index, dtype=object, tupleize_cols=False), dtype=object)


def answers_of(metrics: Sequence[Metric], samples: Sequence[Json]) -> Answers:
    """Return the answers of a record, with the metrics that follow from its documents."""
    frame = documents(map(_chosen, samples))
    group_of = {m.task: m.part_of for m in metrics if m.part_of is not None}
    members: dict[str, list[str]] = {}
    for task in sorted({*frame["task"]}):
        names = [task]  # the task, and the groups that hold it at any depth
        while (group := group_of.get(names[-1])) and group not in names:
            names.append(group)
        for name in names:
            members.setdefault(name, []).append(task)
    measures: dict[tuple[str, str], Measure] = {}
    left_out = []
    for m in (m for m in metrics if m.part_of is None and m.aggregation):
        measure = measured(m, tuple(members.get(m.task, ())), frame)
        computed = math.inf if measure is None else sums.as_recorded(m.aggregation or "", measure.sums)[0]
        if measure is not None and np.isclose(computed, m.value, 1e-6, 1e-9, equal_nan=True):
            measures[measure.name] = measure
        else:
            left_out.append(f"{m.task} {m.label}")
    return Answers(frame, {**measures, **_further(measures, frame, {GOLD: True})}, tuple(left_out))


def _chosen(sample: Json) -> Json:
    """Replace a sample's responses by the number of choices and the chosen one, or by the text."""
    responses = answers(sample)
    scores = [r[0] for r in responses if isinstance(r, list) and r and isinstance(r[0], (int, float))]
    scores = scores if 1 < len(scores) == len(responses) else []
    is_text = len(responses) == 1 and isinstance(responses[0], str) and sample["filter"] == "none"  # nothing extracted
    return {
        **sample, "responses": None, "choices": len(scores), "text": responses[0] if is_text else None,
        "chosen": scores.index(max(scores)) if scores else None,
    }  # fmt: skip


def measured(metric: Metric, members: tuple[str, ...], frame: pd.DataFrame) -> Measure | None:
    """Return a metric with the documents that have a value for it; None if their values are not of its shape."""
    if metric.metric not in frame:
        return None
    columns = zip(frame["task"], frame["filter"], frame[metric.metric], strict=True)
    rows = frame[[task in members and f == metric.filter and v is not None for task, f, v in columns]]
    try:
        values = np.array(rows[metric.metric].tolist())  # NaN is a value
    except ValueError:  # lists of several lengths
        return None
    plain = metric.aggregation == "mean" or metric.metric == "perplexity"  # lm-eval's own perplexity
    n = len(rows)
    if not n or values.dtype.kind not in "biuf" or values.shape != ((n,) if plain else (n, 2)):
        return None
    x, w = (values.astype(float), np.ones(n)) if plain else values.astype(float).T
    sizes = Counter(rows["task"])
    weight = np.array([1 / sizes[task] if metric.weights == "tasks" else 1.0 for task in rows["task"]])
    binary = metric.aggregation == "mean" and bool(np.isin(x, (0, 1)).all())
    choices = rows["choices"].to_numpy(float) * kind_of(metric.metric).chance
    chance = np.where(choices > 1, 1 / np.maximum(choices, 1) if binary else math.nan, 0.0)
    units = rows["task"]
    if members == (metric.task,):
        units = [cluster or number for cluster, number in zip(rows["cluster"], rows["doc_id"], strict=True)]
    units = [f"{metric.task} {unit}" for unit in units]
    return Measure(metric, members, rows.index.tolist(), x, w, weight, chance, units, binary)


def _further(
    measures: Mapping[tuple[str, str], Measure], frame: pd.DataFrame, names: Mapping[str, bool | None]
) -> dict[tuple[str, str], Measure]:
    """Return measures that no record names, of the documents of each task's first one. names: -> higher is better.

    Of a distance every document must have a value: no share stands for all.
    """
    firsts: dict[str, Measure] = {}
    for own in measures.values():
        firsts.setdefault(own.metric.task, own)
    further = {}
    for own, (name, up) in itertools.product(firsts.values(), names.items()):
        how = kind_of(name).kind
        metric = replace(own.metric, metric=name, value=math.nan, stderr=None, higher_is_better=up, aggregation=how)
        measure = measured(metric, own.members, frame)
        inside = [task in own.members for task in frame["task"]]
        if measure is not None and (name == GOLD or frame.loc[inside, name].notna().all()):
            further[measure.name] = measure
    return further


# -- distances from dense ----------------------------------------------------------------------------------------------


def add_distances(own: Answers, dense: Answers, texts: bool = True) -> Answers:
    """Add the distances of answers from dense's, as metrics of their tasks; both are of the same documents.

    `flips`: the chosen answer of an item differs. For texts `dense_rougeL`: ROUGE-L against dense's text;
    `dense_tokens`: tokens before the first difference; `length`: tokens / dense's; `limited`: the share of texts with
    all the tokens that they may have; `loops`: the share of texts that repeat themselves (`loop_at`).
    """
    of: dict[str, tuple[str, Callable[..., Any]]] = {
        "flips": ("chosen", lambda a, b: float(a != b)), "dense_tokens": ("token_ids", _common),
        "length": ("token_ids", lambda a, b: [float(len(a)), float(len(b))]),
        "limited": ("limited", lambda a, _: float(a)), "loops": ("token_ids", lambda a, _: float(loop_at(a) < len(a))),
    }  # fmt: skip
    if texts:  # it takes time
        of["dense_rougeL"] = "text", _similarity
    frame = own.documents.copy()
    for name, (column, distance) in of.items():
        sides = [side.documents[column] for side in (own, dense) if column in side.documents]
        if len(sides) == 2:
            values = [None if None in pair else distance(*pair) for pair in zip(*sides, strict=True)]
            frame[name] = pd.Series(values, frame.index, dtype=object)
    better = {"flips": False, "dense_rougeL": True, "dense_tokens": True}
    further = _further(own.measures, frame, {name: better.get(name) for name in of})
    return own._replace(documents=frame, measures={**own.measures, **further})


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and most folders have no texts

    return RougeScorer(["rougeL"], use_stemmer=True)


def _similarity(ours: str, theirs: str) -> float:
    """Return ROUGE-L against dense's text; 1 for the same text, also where it has no word that ROUGE knows."""
    return 1.0 if ours == theirs else float(_scorer().score(theirs, ours)["rougeL"].fmeasure)


def loop_at(tokens: Sequence[int]) -> int:
    """Return how many tokens stand before a run of `LOOP` or more comes again at once; all, if none does."""
    ids, found = np.asarray(tokens), [len(tokens)]
    for lag in range(LOOP, len(ids) // 2 + 1):
        breaks = np.flatnonzero(np.r_[True, ids[lag:] != ids[:-lag], True])  # `lag` equal tokens stand between two
        found.extend(breaks[:-1][np.diff(breaks) > lag][:1] + lag)
    return int(min(found))


def _common(ours: Sequence[int], theirs: Sequence[int]) -> float:
    return float(len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))]))


# -- one metric beside another cell's ----------------------------------------------------------------------------------


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
    def chance(self) -> float | None:
        """The quality of guessing; None if unknown."""
        chance = float(np.average(self.a.chance, weights=self.a.weight))
        return None if np.isnan(chance) else chance

    def estimate(self, side: Measure, above_chance: bool = True) -> Estimate:
        """Estimate the metric of A or B, where 0 is guessing if `above_chance`; a perplexity by its logarithm."""
        parts = side.sums.copy()
        if above_chance:
            parts[:, 0] -= self.a.chance * parts[:, 1]
        value, slopes = sums.linearised(self.kind, parts)
        units, place = np.unique(self.a.units, return_inverse=True)
        return Estimate(value, dict(zip(units.tolist(), np.bincount(place, slopes).tolist(), strict=True)))

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
