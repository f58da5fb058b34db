"""What came out of a cell, document by document, and the test of one metric between two cells.

`compare` and `check` stand on this: which cells are the same question, which documents are the same, which values are
a metric's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dart_eval.errors import UserError
from dart_eval.results import metrics, stats
from dart_eval.results.format import sparsity
from dart_eval.results.inputs import HASH_DIGITS, HOW, identity, model_of
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.labels import values
from dart_eval.results.record import Record
from dart_eval.results.store import Store

DENSE = "dense"


@dataclass(frozen=True)
class Document:
    """One document under one filter: digests of itself and its prompt, its cluster, its values."""

    doc: str
    prompt: str
    cluster: str | None
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A metric of a task, as records name it.

    Attributes:
        members: the tasks whose documents it is made of: itself, or those of a group.
        equal: members weigh the same whatever their size; else documents do.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    members: tuple[str, ...]
    equal: bool = False

    @property
    def name(self) -> str:
        """The metric without its filter."""
        return self.metric.partition(",")[0]

    @property
    def filter(self) -> str:
        return self.metric.partition(",")[2] or "none"

    @property
    def kind(self) -> str:
        return metrics.of(self.name).kind


Key = tuple[str, int, str]  # task, doc_id, filter


@dataclass(frozen=True)
class Outcome:
    """A cell's measures and documents; `left_out` names metrics that do not follow from their documents' values."""

    measures: tuple[Measure, ...]
    documents: dict[Key, Document]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A finished cell; `read` opens its outcome.

    Attributes:
        source: the folder or file it lies in. older: how many earlier runs of the same question there are.
        settings: the record's, where there is one. doubt: a record beside it that cannot be read and has its name, so
            that it may be a later run of the same cell; empty where there is none.
    """

    key: str
    inputs: dict[str, Any]
    source: str
    created: str
    read: Callable[[], Outcome] = field(repr=False, compare=False)
    older: int = 0
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    doubt: str = ""


def cells(folder: Path, strict: bool = False) -> list[Cell]:
    """The cells of a results folder; of those that were asked the same, the newest.

    Args:
        strict: refuse a folder with a record that cannot be read; else it is named on stderr and left out.

    Raises:
        UserError: the folder cannot be read, or holds cells that differ only in how they were computed.
    """
    store = Store(folder)
    found = store.scan()
    if strict and found.unread:
        raise next(iter(found.unread.values()))
    found.tell()
    unread = {_title(file): file.name for file in found.unread}

    def reader(record: Record) -> Callable[[], Outcome]:
        return lambda: outcome(record, store.samples(record))

    return newest([
        Cell(
            r.key, r.inputs, str(folder), r.created, reader(r), settings=r.settings,
            doubt=unread.get(_title(found.files[r.key]), ""),
        )
        for r in found.records
    ])  # fmt: skip


def _title(file: Path) -> str:
    """What a record's file is called without its key: runs of one cell share it."""
    return file.stem.rpartition("-")[0]


def newest(found: Sequence[Cell]) -> list[Cell]:
    """One cell for each thing that was asked: the one finished last, for code and versions move on.

    Raises:
        UserError: they differ in more than code and versions.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in found:
        groups.setdefault(identity(cell.inputs), []).append(cell)
    for group in groups.values():
        for name in fields_of(HOW):
            found_values = values(name, group)
            if len(found_values) > 1:
                place = f"{describe(group[0])} in {group[0].source}"
                raise UserError(
                    f"{place} is there several times, with {name} {' and '.join(found_values)}",
                    "keep them in folders of their own",
                )
    return [
        dataclasses.replace(
            max(group, key=lambda c: (c.created, c.key)), older=len(group) - 1 + sum(c.older for c in group)
        )
        for group in groups.values()
    ]


def older_note(found: Iterable[Cell]) -> list[str]:
    """A remark where `newest` had a choice: after going back to older code the newest run is not the current one."""
    several = sorted({c.source for c in found if c.older})
    return [f"Several runs of one cell in {source}: the one finished last counts." for source in several]


def describe(cell: Cell, model: bool = False) -> str:
    """A cell in a few words, for messages; with its model where that must be said."""
    inputs = cell.inputs
    method = cell.settings.get("method") or inputs["method"]
    which = f" of {model_of(inputs['model'])}" if model else ""
    return f"{inputs['task']} under {method} at {sparsity(inputs['sparsity'])}{which}"


def outcome(record: Record, samples: Sequence[dict[str, Any]]) -> Outcome:
    """Documents and measures of a record; a group's weights are those that give the value in the record."""
    documents = {
        (s["task"], s["doc_id"], s["filter"]): Document(
            s["doc_hash"][:HASH_DIGITS], s["prompt_hash"][:HASH_DIGITS], (s.get("cluster") or "")[:16] or None,
            s["metrics"],
        )
        for s in samples
    }  # fmt: skip
    leaves = {task for task, _, _ in documents}
    children: dict[str, set[str]] = {}
    for m in record.metrics:
        if m.part_of is not None:
            children.setdefault(m.part_of, set()).add(m.task)

    def members(task: str) -> set[str]:
        below, ends, seen = [task], set(), set()
        while below:
            last = below.pop()
            if last not in seen:  # a group that is its own member would go round for ever
                seen.add(last)
                below += children.get(last, ())
                ends |= set() if last in children else {last}
        return ends & leaves

    measures: list[Measure] = []
    left_out = []
    whole = Outcome((), documents)
    for m in (m for m in record.metrics if m.part_of is None):
        tasks = tuple(sorted(members(m.task)))
        for equal in (False, True):
            measure = Measure(m.task, m.metric, m.higher_is_better, tasks, equal)
            found = value(measure, whole)
            if found is not None and _same(found, m.value):
                measures.append(measure)
                break
        else:
            left_out.append(f"{m.task} {m.metric}")
    firsts: dict[str, Measure] = {}
    for measure in measures:
        firsts.setdefault(measure.task, measure)
    golds = [Measure(m.task, metrics.GOLD, True, m.members, m.equal) for m in firsts.values()]
    measures += [g for g in golds if value(g, whole) is not None]
    return Outcome(tuple(measures), documents, tuple(left_out))


def _same(computed: float, recorded: float) -> bool:
    both_nan = math.isnan(computed) and math.isnan(recorded)
    return both_nan or math.isclose(computed, recorded, rel_tol=1e-6, abs_tol=1e-9)


def _keys(measure: Measure, found: Outcome) -> list[Key]:
    return sorted(
        key
        for key, document in found.documents.items()
        if key[0] in measure.members and key[2] == measure.filter and measure.name in document.metrics
    )


def _values(measure: Measure, found: Outcome, keys: Sequence[Key]) -> np.ndarray | None:
    """[n] or [n, width] values as `stats.KINDS` takes them; None where they are not of that shape."""
    raw = [found.documents[k].metrics[measure.name] for k in keys]
    if measure.name == "perplexity":  # of lm-eval: every document weighs the same
        raw = [[v, 1] for v in raw]
    width = metrics.of(measure.name).width
    for v in raw:
        parts = v if isinstance(v, list) else [v]
        if len(parts) != width or not all(isinstance(p, (int, float)) for p in parts):
            return None
    return np.array(raw, float) if raw else None


def _weights(measure: Measure, keys: Sequence[Key]) -> np.ndarray | None:
    if not measure.equal:
        return None
    sizes = {task: sum(k[0] == task for k in keys) for task in measure.members}
    return np.array([1 / sizes[k[0]] for k in keys])


def value(measure: Measure, found: Outcome) -> float | None:
    """The metric over a cell's documents; None where it cannot be computed from them."""
    keys = _keys(measure, found)
    values, weights = _values(measure, found, keys), _weights(measure, keys)
    return None if values is None else stats.value(measure.kind, values, weights)


def contrast(measure: Measure, a: Outcome, b: Outcome) -> stats.Paired | None:
    """The paired test of a measure between two outcomes that `check_paired` let pass.

    A group's independent units are its members, a task's its clusters, or its documents where they have none.
    """
    found = paired_values(measure, a, b)
    if found is None:
        return None
    x, y, units, weights = found
    return stats.paired(measure.kind, x, y, units, weights, measure.higher_is_better)


def contrast_of_means(
    measures: Sequence[Measure], a: Sequence[Outcome], b: Sequence[Outcome], shares: Sequence[float]
) -> stats.Paired | None:
    """The paired test of a weighted mean over several tasks.

    Args:
        measures: means (no perplexities, no BLEU), one per task. a, b: that task's outcomes. shares: its weight.
    """
    parts = [paired_values(m, x, y) for m, x, y in zip(measures, a, b, strict=True)]
    found = [p for p in parts if p is not None]
    if len(found) < len(parts) or any(m.kind != "mean" for m in measures):
        return None
    weights = []
    for share, (x, _, _, w) in zip(shares, found, strict=True):
        own = np.ones(len(x)) if w is None else w
        weights.append(share * own / own.sum())
    x, y = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    units = [unit for _, _, own, _ in found for unit in own]
    return stats.paired("mean", x, y, units, np.concatenate(weights), measures[0].higher_is_better)


def paired_values(
    measure: Measure, a: Outcome, b: Outcome
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray | None] | None:
    """Values under a and b, the independent unit of each document, and weights where documents have some; None where
    they are not of the same documents, or not of one shape."""
    keys = _keys(measure, a)
    x, y = _values(measure, a, keys), _values(measure, b, keys) if keys == _keys(measure, b) else None
    if x is None or y is None:
        return None
    group = measure.members != (measure.task,)
    units = [k[0] if group else a.documents[k].cluster or f"{k[0]} {k[1]}" for k in keys]
    return x, y, units, _weights(measure, keys)


def cell_of(record: Record, found: Outcome) -> Cell:
    """A record whose outcome has been read, as a cell."""
    return Cell(record.key, record.inputs, "", record.created, lambda: found, settings=record.settings)


class Unpaired(UserError):
    """Two cells were not given the same documents and prompts."""


def check_paired(a: Cell, x: Outcome, b: Cell, y: Outcome) -> None:
    """Refuse what is not the same documents with the same prompts.

    Raises:
        Unpaired: with what differs.
    """
    what = f"{a.inputs['task']} ({a.source}) and {b.inputs['task']} ({b.source}) cannot be paired"
    sizes = [len({k[:2] for k in found.documents}) for found in (x, y)]
    limits = [cell.inputs.get("limit") for cell in (a, b)]
    if sizes[0] != sizes[1]:
        said = [
            f"{size} documents ({f'--limit {limit}' if limit else 'no --limit'})"
            for size, limit in zip(sizes, limits, strict=True)
        ]
        raise Unpaired(f"{what}: {said[0]} and {said[1]}", "run both with the same data and --limit")
    if x.documents.keys() != y.documents.keys():
        raise Unpaired(f"{what}: they have other documents or filters", "run both with the same data")
    for name, part in (("documents", "doc"), ("prompts", "prompt")):
        other = [k for k in sorted(x.documents) if getattr(x.documents[k], part) != getattr(y.documents[k], part)]
        if other:
            raise Unpaired(
                f"{what}: {len(other)} of {len(x.documents)} {name} differ (the first: {other[0][0]} {other[0][1]})",
                "run both with the same data, few-shot examples, chat template and version of lm-eval",
            )
