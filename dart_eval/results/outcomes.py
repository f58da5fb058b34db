"""The outcomes of cells, document by document, and the test of one metric between two cells.

The base of `compare` and `check`: which cells answer the same question, which documents are the same, and which values
belong to a metric.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dart_eval.results import metrics, stats
from dart_eval.results.documents import Documents
from dart_eval.results.documents import documents as documents_of
from dart_eval.results.format import sparsity
from dart_eval.results.inputs import HASH_DIGITS, HOW, identity, model_of
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.labels import grouped, values_of
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json


@dataclass(frozen=True)
class Measure:
    """A metric of a task, as records name it.

    Attributes:
        members: the tasks whose documents it covers: itself, or those of a group.
        equal: whether members weigh the same whatever their size; else documents do. One side's value may fit both.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    members: tuple[str, ...]
    equal: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """The metric without its filter."""
        return self.metric.partition(",")[0]

    @property
    def filter(self) -> str:
        return self.metric.partition(",")[2] or "none"

    @property
    def kind(self) -> str:
        return metrics.kind_of(self.name).kind


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        left_out: names of metrics that do not follow from their documents' values.
    """

    measures: tuple[Measure, ...]
    documents: Documents
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A finished cell; `read` opens its outcome.

    Attributes:
        source: its folder or file.
        older: number of earlier runs of the same question.
        settings: of the record, if there is one.
        unread_rival: an unreadable record with its name, which may be a later run of the cell; empty without one.
    """

    key: str
    inputs: Json
    source: str
    created: str
    read: Callable[[], Outcome] = field(repr=False, compare=False)
    older: int = 0
    settings: Json = field(default_factory=dict, compare=False)
    unread_rival: str = ""


def cells(folder: Path, strict: bool = False) -> list[Cell]:
    """Return the cells of a results folder, the newest of equal ones.

    Args:
        strict: whether to refuse a folder with an unreadable record; else it is named on stderr and left out.

    Raises:
        UserError: the folder cannot be read, or holds cells that differ only in how they were computed.
    """
    store = Store(folder)
    found = store.scan()
    if strict and found.unread:
        raise next(iter(found.unread.values()))
    found.report()
    unread = {_title(file): file.name for file in found.unread}
    return newest([cell_of(store, r, unread.get(_title(found.files[r.key]), "")) for r in found.records])


def cell_of(store: Store, record: Record, unread_rival: str = "") -> Cell:
    """Return a record as a cell, whose samples are read once, when they are needed."""

    def read() -> Outcome:
        if record.key not in store.outcomes:
            store.outcomes[record.key] = outcome(record, store.samples(record))
        found: Outcome = store.outcomes[record.key]
        return found

    return Cell(
        record.key, record.inputs, str(store.folder), record.created, read, settings=record.settings,
        unread_rival=unread_rival,
    )  # fmt: skip


def _title(file: Path) -> str:
    """Return the name of a record's file without its key, which runs of one cell share."""
    return file.stem.rpartition("-")[0]


def newest(cells: Sequence[Cell]) -> list[Cell]:
    """Return the last finished cell for each question, as code and versions move on.

    Raises:
        UserError: they differ in more than code and versions.
    """
    chosen = []
    for group in grouped(cells, lambda cell: identity(cell.inputs)).values():
        last = max(group, key=lambda c: (c.created, c.key))
        for name in fields_of(HOW):
            if len(several := values_of(name, group)) > 1:
                places = sorted({c.source for c in group})
                raise UserError(
                    f"{' and '.join(places)} {'has' if len(places) == 1 else 'have'} {describe(group[0])} several "
                    f"times, with {name} {' and '.join(several)}",
                    "keep them in folders of their own" if len(places) == 1 else "leave one of these folders out",
                )  # fmt: skip
        chosen.append(
            dataclasses.replace(last, older=len({(c.key, c.created) for c in group}) - 1 + sum(c.older for c in group))
        )
    return chosen


def older_note(cells: Iterable[Cell]) -> list[str]:
    """Return a remark if `newest` had a choice: after a return to older code the newest run is not the current one."""
    several = sorted({c.source for c in cells if c.older})
    return [f"Several runs of one cell in {source}: the one finished last counts." for source in several]


def describe(cell: Cell, model: bool = False, method: str = "") -> str:
    """Describe a cell in a few words, for messages. model: whether to name its model. method: its label."""
    inputs = cell.inputs
    method = method or cell.settings.get("method") or inputs["method"]
    which = f" of {model_of(inputs['model'])}" if model else ""
    return f"{inputs['task']} under {method} at {sparsity(inputs['sparsity'])}{which}"


def outcome(record: Record, samples: Sequence[dict[str, object]]) -> Outcome:
    """Return documents and measures of a record; a group's weights are those that give the value in the record."""
    documents = _without_responses(documents_of(samples))
    tasks = {task for task, *_ in documents.index}
    children: dict[str, set[str]] = {}
    for m in record.metrics:
        if m.part_of is not None:
            children.setdefault(m.part_of, set()).add(m.task)
    measures: list[Measure] = []
    left_out = []
    for m in (m for m in record.metrics if m.part_of is None and metrics.kind_of(m.metric).kind):
        members = tuple(sorted(_ends(m.task, children) & tasks))
        for equal in (False, True):
            measure = Measure(m.task, m.metric, m.higher_is_better, members, equal)
            found = value(measure, documents)
            if found is not None and _same(found, m.value):
                measures.append(measure)
                break
        else:
            left_out.append(f"{m.task} {m.metric}")
    firsts = {measure.task: measure for measure in reversed(measures)}
    golds = [Measure(m.task, metrics.GOLD, True, m.members, m.equal) for m in reversed(firsts.values())]
    measures += [g for g in golds if value(g, documents) is not None]
    return Outcome(tuple(measures), documents, tuple(left_out))


def _without_responses(documents: Documents) -> Documents:
    """Replace responses by the number of choices and the chosen one, or by the text."""
    responses = documents.columns.pop("responses", None) or [None] * len(documents)
    scores = [_scores(found) for found in responses]
    if "acc_mutual_info" in documents.columns:  # each choice was scored without its context, too, after all others
        scores = [found[: len(found) // 2] for found in scores]
    return documents.assign(
        choices=[len(found) for found in scores],
        chosen=[max(range(len(found)), key=found.__getitem__) if found else None for found in scores],
        text=[  # what a filter extracts is no text
            r[0] if f == "none" and isinstance(r, list) and len(r) == 1 and isinstance(r[0], str) else None
            for (_, _, f), r in zip(documents.index, responses, strict=True)
        ],
    )


def _scores(responses: Any) -> list[float]:
    """Return the log-likelihoods of an item's choices, if it has any."""
    many = isinstance(responses, list) and len(responses) > 1 and all(isinstance(r, list) and r for r in responses)
    scores = [r[0] for r in responses] if many else []
    return scores if all(isinstance(score, (int, float)) for score in scores) else []


def _ends(task: str, children: Mapping[str, set[str]]) -> set[str]:
    """Return the tasks of a group at any depth that are not groups, or the task itself."""
    below, ends, seen = [task], set(), set()
    while below:
        last = below.pop()
        if last not in seen:  # a group that is its own member would go round for ever
            seen.add(last)
            below += children.get(last, ())
            ends |= set() if last in children else {last}
    return ends


def _same(computed: float, recorded: float) -> bool:
    both_nan = math.isnan(computed) and math.isnan(recorded)
    return both_nan or math.isclose(computed, recorded, rel_tol=1e-6, abs_tol=1e-9)


def rows_of(measure: Measure, documents: Documents) -> Documents:
    """Return the documents that have a value for a measure."""
    members, filter_ = set(measure.members), measure.filter
    known = [
        i for i, (key, v) in enumerate(zip(documents.index, documents.columns.get(measure.name, ()), strict=False))
        if v is not None and key[0] in members and key[2] == filter_
    ]  # fmt: skip
    return documents if len(known) == len(documents) else documents.only(known)


def _values(measure: Measure, rows: Documents) -> np.ndarray | None:
    """Return [n] or [n, width] values for `stats.KINDS`; None if they do not have that shape."""
    raw = rows.columns[measure.name] if len(rows) else []
    if measure.name == "perplexity":  # of lm-eval: every document weighs the same
        raw = [[v, 1] for v in raw]
    width = {"mean": 1, "bleu": 10}.get(measure.kind, 2)
    try:
        made = np.array(raw)
    except ValueError:  # lists of several lengths
        return None
    shape = (len(raw), width)[: 2 if width > 1 else 1]
    return made.astype(float) if raw and made.shape == shape and made.dtype.kind in "biuf" else None


def _weights(measure: Measure, rows: Documents) -> np.ndarray | None:
    """Return a weight per document; None if all weigh the same."""
    if not measure.equal:
        return None
    sizes = Counter(task for task, *_ in rows.index)
    return 1 / np.array([sizes[task] for task, *_ in rows.index], float)


def value(measure: Measure, documents: Documents) -> float | None:
    """Return the metric over documents; None if it cannot be computed from them."""
    rows = rows_of(measure, documents)
    values = _values(measure, rows)
    return None if values is None else stats.value(measure.kind, values, _weights(measure, rows))


class Pairs(NamedTuple):
    """Values of a measure under A and under B, of the same documents in the same order.

    Attributes:
        measure: the metric.
        a: [n] or [n, width], values under A.
        b: the same under B.
        units: [n], the independent unit of each document: a group's members, or a task's clusters or documents.
        weights: [n], or None.
        chance: [n], the quality of guessing; 0 if the metric is not an accuracy of choices; NaN if unknown.
    """

    measure: Measure
    a: np.ndarray
    b: np.ndarray
    units: list[str]
    weights: np.ndarray | None
    chance: np.ndarray


def pairs(measure: Measure, a: Outcome, b: Outcome) -> Pairs | None:
    """Return the values of two outcomes that passed `check_paired`; None if documents or shapes differ."""
    left, right = rows_of(measure, a.documents), rows_of(measure, b.documents)
    x, y = _values(measure, left), _values(measure, right) if left.index == right.index else None
    if x is None or y is None:
        return None
    group = measure.members != (measure.task,)
    units = [
        task if group else cluster or f"{task} {number}"
        for (task, number, _), cluster in zip(left.index, left.columns["cluster"], strict=True)
    ]
    return Pairs(measure, x, y, units, _weights(measure, left), _chance(measure, left, x, y))


def _chance(measure: Measure, rows: Documents, *values: np.ndarray) -> np.ndarray:
    """Return [n] the quality of guessing: 1 / choices, if every answer is either right or wrong.

    A share of the probability, as of TruthfulQA's mc2, has a chance that does not follow from the number of choices.
    """
    if not metrics.kind_of(measure.name).chance or "choices" not in rows.columns:
        return np.zeros(len(rows))
    choices = np.array(rows.columns["choices"], float)
    guess = np.where(choices > 1, 1 / np.maximum(choices, 1), 0.0)
    return guess if all(np.isin(v, (0, 1)).all() for v in values) else np.where(choices > 1, np.nan, 0.0)


def own_distance(measure: Measure, pruned: Outcome, dense: Outcome) -> Outcome:
    """Add to the dense outcome its distance from itself, at the positions of the pruned one."""
    if measure.name not in ("kl", "top1"):
        return dense
    own = pruned.documents.columns[measure.name]
    values = [None if v is None else [0.0 if measure.name == "kl" else v[1], v[1]] for v in own]
    documents = dense.documents.assign(**{measure.name: values})
    return dataclasses.replace(dense, measures=(*dense.measures, measure), documents=documents)


class Unpaired(UserError):
    """Two cells have other documents or prompts."""


def check_paired(a: Cell, x: Outcome, b: Cell, y: Outcome) -> None:
    """Refuse cells with other documents or prompts.

    Raises:
        Unpaired: names the difference.
    """
    what = f"{a.inputs['task']} ({a.source}) and {b.inputs['task']} ({b.source}) cannot be paired"
    sizes = [len({key[:2] for key in found.documents.index}) for found in (x, y)]
    if sizes[0] != sizes[1]:
        limits = [f"--limit {cell.inputs['limit']}" if cell.inputs.get("limit") else "no --limit" for cell in (a, b)]
        said = " and ".join(f"{size} documents ({limit})" for size, limit in zip(sizes, limits, strict=True))
        raise Unpaired(f"{what}: {said}", "run both with the same data and --limit")
    if x.documents.index != y.documents.index:
        raise Unpaired(f"{what}: they have other documents or filters", "run both with the same data")
    for name, column in (("documents", "doc_hash"), ("prompts", "prompt_hash")):
        left, right = ([v[:HASH_DIGITS] for v in found.documents.columns[column]] for found in (x, y))
        other = [key for key, *pair in zip(x.documents.index, left, right, strict=True) if pair[0] != pair[1]]
        if other:
            raise Unpaired(
                f"{what}: {len(other)} of {len(left)} {name} differ (the first: {other[0][0]} {other[0][1]})",
                "run both with the same data, few-shot examples, chat template and version of lm-eval",
            )
