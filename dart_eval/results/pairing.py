"""Pairing of cells that answer the same question, and differences between two cells.

The model is part of the question, so cells of the same weights are paired. If neither side has the other's model, a
checkpoint is paired with another of its name, with a remark, since a comparison may be about a changed model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dart_eval.results.inputs import ASKED, DENSE, FIELDS, asked, identity, model_of, question
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.labels import Labelled, grouped
from dart_eval.results.outcomes import Cell, Measure, Outcome, Pairs, check_paired, describe, own_distance, pairs
from dart_eval.util.errors import UserError

N = TypeVar("N", bound=Labelled)


@dataclass(frozen=True)
class Pair:
    """Two cells with the same documents, and their outcomes."""

    a: Cell
    b: Cell
    x: Outcome
    y: Outcome

    def measured(self, measure: Measure) -> Pairs | None:
        """Return the values of a measure under both; None if one lacks it, or if they do not pair.

        A dense cell does not store its distance from itself.
        """
        x, y = self.x, self.y
        if measure not in y.measures and measure in x.measures and self.b.inputs["method"] == DENSE:
            y = own_distance(measure, x, y)
        if measure not in x.measures and measure in y.measures and self.a.inputs["method"] == DENSE:
            x = own_distance(measure, y, x)
        known = [m for m in (*x.measures, *y.measures) if m == measure]
        if measure not in x.measures or measure not in y.measures:
            return None
        return pairs(dataclasses.replace(measure, equal=any(m.equal for m in known)), x, y)


def pair(a: Cell, b: Cell) -> Pair:
    """Read two cells and check that they have the same documents.

    Raises:
        UnreadSamples: the samples of one cannot be read.
        Unpaired: they have other documents or prompts.
    """
    x, y = a.read(), b.read()
    check_paired(a, x, b, y)
    return Pair(a, b, x, y)


def dense_cells(cells: Iterable[N]) -> dict[str, list[N]]:
    """Return the dense cells without rounding by their question, for `dense_of`."""
    dense = (cell for cell in cells if cell.inputs["method"] == DENSE and not cell.inputs.get("ffn_bits"))
    return grouped(dense, lambda cell: question(cell.inputs))


def dense_of(cell: Labelled, dense: Mapping[str, Sequence[N]]) -> N | None:
    """Return the dense cell of the same question, preferably of the same code and versions."""
    rivals = dense.get(question(cell.inputs), ())
    build = [c for c in rivals if all(c.inputs.get(name) == cell.inputs.get(name) for name in ("code", "versions"))]
    return next(iter(build or rivals), None)


def with_dense(some: Sequence[N], everything: Sequence[N]) -> list[N]:
    """Return some cells of a folder, and their dense cells if these are missing among them."""
    own, there = dense_cells(some), dense_cells(everything)
    alone = [cell for cell in some if question(cell.inputs) not in own]
    beside = {found.key: found for cell in alone if (found := dense_of(cell, there)) is not None}
    return [*some, *beside.values()]


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
            partners[json.dumps(alone[0], sort_keys=True)] = beside[0]
    known = {identity(c.inputs): c for c in theirs}
    found = {}
    for cell in ours:
        model = partners.get(json.dumps(cell.inputs["model"], sort_keys=True), cell.inputs["model"])
        match = known.get(identity({**cell.inputs, "model": model}))
        if match is not None:
            found[cell.key] = match
    return found


def current(now: Sequence[Cell], then: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Return the results that belong to a baseline, and remarks.

    If a baseline has one model of a name and the results several, the one that was run last counts. An older one in
    the folder must not replace it.
    """
    mine, dropped, notes = _models(now), set(), []
    for name, models in _models(then).items():
        rivals = mine.get(name, {})
        if len(models) == 1 and len(rivals) > 1:
            last = max((c for c in now if c.inputs["model"]["name"] == name), key=lambda c: (c.created, c.key))
            dropped |= rivals.keys() - {json.dumps(last.inputs["model"], sort_keys=True)}
            several = f"Several models named {name} in {last.source} ({_named(list(rivals.values()))})"
            notes.append(f"{several}: the one finished last counts.")
    return [c for c in now if json.dumps(c.inputs["model"], sort_keys=True) not in dropped], notes


def _models(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, object]]]:
    """Return name -> its models, by their identity."""
    models: dict[str, dict[str, dict[str, object]]] = {}
    for cell in cells:
        model = cell.inputs["model"]
        models.setdefault(model["name"], {})[json.dumps(model, sort_keys=True)] = model
    return models


def _named(models: Sequence[dict[str, object]]) -> str:
    return ", ".join(sorted(map(model_of, models)))


def differences(a: Cell, b: Cell) -> dict[str, tuple[str, str]]:
    """Return the differences of two cells' inputs beside the question: a few digits, or all where these agree."""
    found: dict[str, tuple[object, object]] = {}
    for name in sorted((a.inputs.keys() | b.inputs.keys()) - set(fields_of(ASKED)) | {"model"}):
        left, right = a.inputs.get(name), b.inputs.get(name)
        if name in FIELDS and FIELDS[name].any and None in (left, right):
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            parts = sorted(left.keys() | right.keys())
            found |= {f"{name}.{part}": (left.get(part), right.get(part)) for part in parts}
        else:
            found[name] = left, right
    alike = all(a.inputs[name] == b.inputs[name] for name in ("method", "params"))
    expected = {"model.name"} if alike else {"model.name", "method_code"}
    long = {what: (str(x), str(y)) for what, (x, y) in found.items() if what not in expected}
    return {what: (x, y) if x[:12] == y[:12] else (x[:12], y[:12]) for what, (x, y) in long.items() if x != y}


def differing(pairs: Iterable[Pair], say: str, values: str) -> list[str]:
    """Return sentences on the differences between the two sides of pairs.

    Args:
        say: format of a sentence, of a name and values.
        values: format of a value of A and one of B.
    """
    changed: dict[str, set[str]] = {}
    for one in pairs:
        for what, sides in differences(one.a, one.b).items():
            changed.setdefault(what, set()).add(values.format(*sides))
    return [say.format(what, "; ".join(sorted(seen)[:3])) for what, seen in sorted(changed.items())]


def nearest_to(cell: Cell, others: Sequence[Cell]) -> str:
    """Describe how the question of the most similar cell differs."""
    mine = asked(cell.inputs)
    if not others:
        return ""
    other = min(others, key=lambda o: sum(mine[k] != v for k, v in asked(o.inputs).items()))
    theirs = asked(other.inputs)
    mine["model"], theirs["model"] = model_of(mine["model"]), model_of(theirs["model"])
    differences_ = []
    for k in (k for k in fields_of(ASKED) if mine[k] != theirs[k]):
        left, right = mine[k], theirs[k]
        if isinstance(left, dict) and isinstance(right, dict):  # of many parameters, those that differ
            left, right = (
                {n: v for n, v in a.items() if n not in b or b[n] != v} for a, b in ((left, right), (right, left))
            )
        differences_.append(f"{k} {_short(left)} and {_short(right)}")
    where = f"{describe(cell)} in {cell.source} and {describe(other)} in {other.source}"
    return f"{where} differ in {', '.join(differences_)}"


def _short(item: object) -> str:
    return str(item) if not isinstance(item, dict) else ":".join(f"{k}={v}" for k, v in item.items()) or "none"
