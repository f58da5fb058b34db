"""Which cells answer the same question, and which stand beside which: for board, `compare`, `check` and papers.

The model is part of the question, so cells of the same weights are paired. If neither side has the other's model, a
checkpoint is paired with another of its name, with a remark, since a comparison may be about a changed model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from dart_eval.results.documents import Answers, answers_of
from dart_eval.results.format import sparsity
from dart_eval.results.inputs import ASKED, DENSE, FIELDS, HOW, identity, model_of, names, question
from dart_eval.results.labels import Labelled, grouped, values_of
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError, remark
from dart_eval.util.text import Json

N = TypeVar("N", bound=Labelled)


@dataclass(frozen=True, eq=False)
class Cell:
    """A finished cell, whose answers are read when they are needed.

    Attributes:
        source: its folder or file.
        read: opens its answers.
        settings: of the record, if there is one.
    """

    key: str
    inputs: Json
    source: str
    created: str
    read: Callable[[], Answers] = field(repr=False)
    settings: Json = field(default_factory=dict)

    @cached_property
    def answers(self) -> Answers:
        """Its documents and metrics.

        Raises:
            UnreadSamples: they are missing or damaged.
        """
        return self.read()

    def describe(self) -> str:
        """Name the cell in a message."""
        method = self.settings.get("method") or self.inputs["method"]
        return f"{self.inputs['task']} under {method} at {sparsity(self.inputs['sparsity'])}"


def cell_of(store: Store, record: Record) -> Cell:
    """Return a record as a cell."""
    return Cell(
        record.key, record.inputs, str(store.folder), record.created,
        lambda: answers_of(record.metrics, store.samples(record)), record.settings,
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
    return newest([cell_of(store, record) for record in scan.records])


def newest(cells: Sequence[Cell]) -> list[Cell]:
    """Return the last finished cell for each question, as code and versions move on.

    Raises:
        UserError: they differ in more than code and versions.
    """
    chosen, replaced = [], set[str]()
    for group in grouped(cells, lambda cell: identity(cell.inputs)).values():
        places = {cell.source for cell in group}
        for name in names(HOW):
            if len(values := values_of(name, group)) > 1:
                raise UserError(
                    f"{group[0].describe()} is in {' and '.join(sorted(places))} with {name} {' and '.join(values)}",
                    "keep such cells in folders of their own, and name one of these",
                )
        chosen.append(max(group, key=lambda cell: (cell.created, cell.key)))
        replaced |= places if len({(cell.key, cell.created) for cell in group}) > 1 else set()
    if replaced:  # after a return to older code the newest run is not the current one
        remark(f"several runs of one cell in {' and '.join(sorted(replaced))}: the one finished last counts")
    return chosen


def dense_of(cells: Sequence[N]) -> dict[str, N]:
    """Return the key of each cell with a dense one among them -> that, preferably of the same code and versions.

    Dense on rounded weights is no such cell.
    """
    dense = [cell for cell in cells if cell.inputs["method"] == DENSE and not cell.inputs.get("ffn_bits")]
    rivals, chosen = grouped(dense, lambda cell: question(cell.inputs)), {}
    for cell in cells:
        same = rivals.get(question(cell.inputs), [])
        build = [c for c in same if all(c.inputs.get(name) == cell.inputs.get(name) for name in ("code", "versions"))]
        if same:
            chosen[cell.key] = (build or same)[0]
    return chosen


def with_dense(cells: Sequence[N], everything: Sequence[N]) -> list[N]:
    """Return some cells of a folder, and their dense cells if these are missing among them."""
    own, there = dense_of(cells), dense_of([*cells, *everything])
    missing = [there[cell.key] for cell in cells if cell.key in there and cell.key not in own]
    return [*cells, *{dense.key: dense for dense in missing}.values()]


def counterparts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, Cell]:
    """Return the key of each of our cells with a counterpart -> theirs.

    Raises:
        UserError: several models of one name could be meant.
    """
    mine, other = ({_model(cell): cell.inputs["model"] for cell in side} for side in (ours, theirs))
    partner = dict(mine)
    for name in {model["name"] for model in mine.values()}:
        alone = [key for key, model in mine.items() if key not in other and model["name"] == name]
        beside = [model for key, model in other.items() if key not in mine and model["name"] == name]
        if alone and beside:
            if len(alone) > 1 or len(beside) > 1:
                sides = [", ".join(sorted(map(model_of, s))) for s in ([mine[key] for key in alone], beside)]
                raise UserError(
                    f"it is unclear which models to compare: {sides[0]} in {ours[0].source}, {sides[1]} in "
                    f"{theirs[0].source}",
                    "keep each checkpoint's results in a folder of its own, or compare two models with --model A,B",
                )
            partner[alone[0]] = beside[0]
    known = {identity(cell.inputs): cell for cell in theirs}
    matches = {cell.key: known.get(identity({**cell.inputs, "model": partner[_model(cell)]})) for cell in ours}
    return {key: match for key, match in matches.items() if match is not None}


def _model(cell: Cell) -> str:
    return json.dumps(cell.inputs["model"], sort_keys=True)


def differing(pairs: Iterable[tuple[Cell, Cell]], say: str, values: str) -> list[str]:
    """Return sentences on the differences beside the question between the two sides of pairs.

    Args:
        say: format of a sentence, of a name and values.
        values: format of a value of A and one of B.
    """
    changed: dict[str, set[str]] = {}
    for a, b in pairs:
        alike = all(a.inputs[name] == b.inputs[name] for name in ("method", "params"))
        left_out = {*names(ASKED), "" if alike else "method_code"} - {"model"}
        ours, theirs = (_flat({name: v for name, v in c.inputs.items() if name not in left_out}) for c in (a, b))
        for name in {*ours, *theirs} - {"model.name"}:
            x, y = ours.get(name), theirs.get(name)
            if x != y and not (name in FIELDS and FIELDS[name].any and None in (x, y)):
                digits = 12 if str(x)[:12] != str(y)[:12] else None  # a few, or all where these agree
                changed.setdefault(name, set()).add(values.format(str(x)[:digits], str(y)[:digits]))
    return [say.format(name, "; ".join(sorted(texts)[:3])) for name, texts in sorted(changed.items())]


def _flat(inputs: Json) -> Json:
    """Return inputs with the fields of mappings one by one."""
    parts = {name: value for name, value in inputs.items() if isinstance(value, dict)}
    flat = {f"{name}.{part}": value for name, mapping in parts.items() for part, value in mapping.items()}
    return {**inputs, **flat, **dict.fromkeys(parts)}
