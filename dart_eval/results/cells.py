"""Which cells answer the same question, and which stand beside which: for board, `compare`, `check` and papers.

The model is part of the question, so cells of the same weights are paired. If neither side has the other's model, a
checkpoint is paired with another of its name, with a remark, since a comparison may be about a changed model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from dart_eval.results.documents import Answers, answers_of
from dart_eval.results.format import sparsity
from dart_eval.results.inputs import ASKED, DENSE, FIELDS, HOW, asked, identity, model_of, question
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.labels import Labelled, grouped, values_of
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

N = TypeVar("N", bound=Labelled)


@dataclass(frozen=True, eq=False)
class Cell:
    """A finished cell, whose answers are read when they are needed.

    Attributes:
        source: its folder or file.
        read: opens its answers.
        settings: of the record, if there is one.
        older: number of earlier runs of the same question.
        unread_rival: an unreadable record with its name, which may be a later run of the cell; empty without one.
    """

    key: str
    inputs: Json
    source: str
    created: str
    read: Callable[[], Answers] = field(repr=False)
    settings: Json = field(default_factory=dict)
    older: int = 0
    unread_rival: str = ""

    @cached_property
    def answers(self) -> Answers:
        """Its documents and metrics.

        Raises:
            UnreadSamples: they are missing or damaged.
        """
        return self.read()

    def describe(self, model: bool = False, method: str = "") -> str:
        """Name the cell in a message, with its model if asked, and with its method as labelled or typed."""
        method = method or self.settings.get("method") or self.inputs["method"]
        which = f" of {model_of(self.inputs['model'])}" if model else ""
        return f"{self.inputs['task']} under {method} at {sparsity(self.inputs['sparsity'])}{which}"


def cell_of(store: Store, record: Record, unread_rival: str = "") -> Cell:
    """Return a record as a cell."""
    return Cell(
        record.key, record.inputs, str(store.folder), record.created,
        lambda: answers_of(record.metrics, store.samples(record)), record.settings, unread_rival=unread_rival,
    )  # fmt: skip


def cells(folder: Path, strict: bool = False) -> list[Cell]:
    """Return the cells of a results folder, the newest of equal ones.

    Args:
        strict: whether to refuse a folder with an unreadable record; else it is named on stderr and left out.

    Raises:
        UserError: the folder cannot be read, or holds cells that differ only in how they were computed.
    """
    store = Store(folder)
    scan = store.scan()
    if strict and scan.unread:
        raise next(iter(scan.unread.values()))
    scan.report()
    unread = {_title(file): file.name for file in scan.unread}
    return newest([cell_of(store, r, unread.get(_title(scan.files[r.key]), "")) for r in scan.records])


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
        for name in fields_of(HOW):
            if len(values := values_of(name, group)) > 1:
                places = sorted({c.source for c in group})
                raise UserError(
                    f"{' and '.join(places)} {'has' if len(places) == 1 else 'have'} {group[0].describe()} several "
                    f"times, with {name} {' and '.join(values)}",
                    "keep them in folders of their own" if len(places) == 1 else "leave one of these folders out",
                )  # fmt: skip
        last = max(group, key=lambda c: (c.created, c.key))
        runs = {(c.key, c.created) for c in group}
        chosen.append(replace(last, older=len(runs) - 1 + sum(c.older for c in group)))
    return chosen


def older_note(cells: Iterable[Cell]) -> list[str]:
    """Return a remark if `newest` had a choice: after a return to older code the newest run is not the current one."""
    sources = sorted({c.source for c in cells if c.older})
    return [f"Several runs of one cell in {source}: the one finished last counts." for source in sources]


# -- the dense cell of a cell ------------------------------------------------------------------------------------------


def dense_cells(cells: Iterable[N]) -> dict[str, list[N]]:
    """Return the dense cells without rounding by their question, for `dense_of`."""
    dense = (cell for cell in cells if cell.inputs["method"] == DENSE and not cell.inputs.get("ffn_bits"))
    return grouped(dense, lambda cell: question(cell.inputs))


def dense_of(cell: Labelled, dense: Mapping[str, Sequence[N]]) -> N | None:
    """Return the dense cell of the same question, preferably of the same code and versions."""
    rivals = dense.get(question(cell.inputs), ())
    build = [c for c in rivals if all(c.inputs.get(name) == cell.inputs.get(name) for name in ("code", "versions"))]
    return next(iter(build or rivals), None)


def with_dense(cells: Sequence[N], everything: Sequence[N]) -> list[N]:
    """Return some cells of a folder, and their dense cells if these are missing among them."""
    own, there = dense_cells(cells), dense_cells(everything)
    alone = [cell for cell in cells if question(cell.inputs) not in own]
    beside = {dense.key: dense for cell in alone if (dense := dense_of(cell, there)) is not None}
    return [*cells, *beside.values()]


# -- the same cell of another source -----------------------------------------------------------------------------------


def counterparts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, Cell]:
    """Return the key of each of our cells with a counterpart -> theirs.

    Raises:
        UserError: a model of ours matches several of theirs, or several match one.
    """
    partners: dict[str, dict[str, object]] = {}
    mine, other = _models(ours), _models(theirs)
    for name in mine.keys() & other.keys():
        common = mine[name].keys() & other[name].keys()
        alone, beside = ([m for k, m in side[name].items() if k not in common] for side in (mine, other))
        if alone and beside:
            if len(alone) > 1 or len(beside) > 1:
                raise UserError(
                    f"it is unclear which models named {name} to compare: {_named(alone)} in {ours[0].source}, "
                    f"{_named(beside)} in {theirs[0].source}",
                    "keep each checkpoint's results in a folder of its own, or compare two of them: "
                    f"dart-eval compare {' '.join(dict.fromkeys((ours[0].source, theirs[0].source)))} "
                    f"--model {model_of(alone[0])},{model_of(beside[0])}",
                )
            partners[_model_key(alone[0])] = beside[0]
    known = {identity(c.inputs): c for c in theirs}
    matches = {}
    for cell in ours:
        model = partners.get(_model_key(cell.inputs["model"]), cell.inputs["model"])
        if match := known.get(identity({**cell.inputs, "model": model})):
            matches[cell.key] = match
    return matches


def current(now: Sequence[Cell], then: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Return the results that belong to a baseline, and remarks.

    If a baseline has one model of a name and the results several, the one that was run last counts. An older one in
    the folder must not replace it.
    """
    mine, dropped, notes = _models(now), set[str](), []
    for name, models in _models(then).items():
        rivals = mine.get(name, {})
        if len(models) == 1 and len(rivals) > 1:
            last = max((c for c in now if c.inputs["model"]["name"] == name), key=lambda c: (c.created, c.key))
            dropped |= rivals.keys() - {_model_key(last.inputs["model"])}
            several = f"Several models named {name} in {last.source} ({_named(list(rivals.values()))})"
            notes.append(f"{several}: the one finished last counts.")
    return [c for c in now if _model_key(c.inputs["model"]) not in dropped], notes


def _model_key(model: Json) -> str:
    return json.dumps(model, sort_keys=True)


def _models(cells: Sequence[Cell]) -> dict[str, dict[str, Json]]:
    """Return name -> its models, by their identity."""
    models: dict[str, dict[str, Json]] = {}
    for cell in cells:
        model = cell.inputs["model"]
        models.setdefault(model["name"], {})[_model_key(model)] = model
    return models


def _named(models: Sequence[Json]) -> str:
    return ", ".join(sorted(map(model_of, models)))


# -- differences in words ----------------------------------------------------------------------------------------------


def _differing(left: Json, right: Json, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the fields in which two inputs differ, those of mappings one by one, and both values as text."""
    values: dict[str, tuple[object, object]] = {}
    for name in names:
        x, y = left.get(name), right.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            values |= {f"{name}.{part}": (x.get(part), y.get(part)) for part in sorted({*x, *y})}
        elif not (name in FIELDS and FIELDS[name].any and None in (x, y)):
            values[name] = x, y
    return {name: (str(x), str(y)) for name, (x, y) in values.items() if x != y}


def differing(pairs: Iterable[tuple[Cell, Cell]], say: str, values: str) -> list[str]:
    """Return sentences on the differences beside the question between the two sides of pairs.

    Args:
        say: format of a sentence, of a name and values.
        values: format of a value of A and one of B.
    """
    changed: dict[str, set[str]] = {}
    for a, b in pairs:
        alike = all(a.inputs[name] == b.inputs[name] for name in ("method", "params"))
        names = sorted(
            (a.inputs.keys() | b.inputs.keys()) - {*fields_of(ASKED)} - {*([] if alike else ["method_code"])}
        )
        fields = _differing(a.inputs, b.inputs, ["model", *names])
        for name, (x, y) in fields.items():
            if name != "model.name":  # a few digits, or all where these agree
                sides = (x, y) if x[:12] == y[:12] else (x[:12], y[:12])
                changed.setdefault(name, set()).add(values.format(*sides))
    return [say.format(name, "; ".join(sorted(texts)[:3])) for name, texts in sorted(changed.items())]


def nearest_to(cell: Cell, others: Sequence[Cell], free: Collection[str] = ()) -> str:
    """Describe how the question of the most similar cell differs. free: inputs in which it may."""
    if not others:
        return ""
    names = [name for name in fields_of(ASKED) if name not in free]
    fields = {other: _differing(asked(cell.inputs), asked(other.inputs), names) for other in others}
    nearest = min(others, key=lambda other: len(fields[other]))
    parts = (f"{name} {x} and {y}" for name, (x, y) in fields[nearest].items())
    where = f"{cell.describe()} in {cell.source} and {nearest.describe()} in {nearest.source}"
    return f"{where} differ in {', '.join(parts)}"
