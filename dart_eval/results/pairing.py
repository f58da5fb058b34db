"""Which cells of two sets answer the same question, and what two cells differ in.

The model is part of the question. So cells of the same weights go together; and where neither side has the other's
model, one checkpoint goes with another of its name, which is said: a changed model is what a comparison may be about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dart_eval.results.inputs import ASKED, DENSE, FIELDS, asked, identity, model_of, question
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.labels import Named
from dart_eval.results.outcomes import Cell, Measure, Outcome, Pairs, check_paired, describe, own_distance, pairs
from dart_eval.util.errors import UserError

N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Pair:
    """Two cells that were given the same documents, and what came out of each."""

    a: Cell
    b: Cell
    x: Outcome
    y: Outcome

    def measured(self, measure: Measure) -> Pairs | None:
        """The values of a measure under both; None where one lacks it, or where they do not pair.

        A dense cell does not store how far it is from itself.
        """
        y = self.y
        if measure not in y.measures and measure in self.x.measures and self.b.inputs["method"] == DENSE:
            y = own_distance(measure, self.x, y)
        known = measure in self.x.measures and measure in y.measures
        return pairs(measure, self.x, y) if known else None


def pair(a: Cell, b: Cell) -> Pair:
    """Read two cells and see that they are of the same documents.

    Raises:
        UnreadSamples: the samples of one cannot be read.
        Unpaired: they have other documents or prompts.
    """
    x, y = a.read(), b.read()
    check_paired(a, x, b, y)
    return Pair(a, b, x, y)


def dense_cells(found: Iterable[N]) -> dict[str, list[N]]:
    """The dense cells among some that no rounding changed, by what they were asked: for `dense_of`."""
    known: dict[str, list[N]] = {}
    for cell in found:
        if cell.inputs["method"] == DENSE and not cell.inputs.get("ffn_bits"):
            known.setdefault(question(cell.inputs), []).append(cell)
    return known


def dense_of(cell: Named, dense: Mapping[str, Sequence[N]]) -> N | None:
    """The dense cell that was asked what this one was, best of the same code and versions."""
    rivals = dense.get(question(cell.inputs), ())
    build = [c for c in rivals if all(c.inputs.get(name) == cell.inputs.get(name) for name in ("code", "versions"))]
    return next(iter(build or rivals), None)


def with_dense(some: Sequence[N], everything: Sequence[N]) -> list[N]:
    """Some cells of a folder, and the dense ones of it that they are held against where none is among them."""
    own, there = dense_cells(some), dense_cells(everything)
    alone = [cell for cell in some if question(cell.inputs) not in own]
    beside = {found.key: found for cell in alone if (found := dense_of(cell, there)) is not None}
    return [*some, *beside.values()]


def counterparts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, Cell]:
    """Key of each of our cells that has one -> theirs.

    Raises:
        UserError: a model of ours goes with several of theirs, or several with one.
    """
    partners: dict[str, dict[str, Any]] = {}
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
    """The results that a baseline speaks of, and remarks.

    A baseline that knows one model of a name is held against one: of several, the one that was run last. An older one
    that still lies in the folder must not stand in for it.
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


def _models(found: Sequence[Cell]) -> dict[str, dict[str, dict[str, Any]]]:
    """Name -> its models, by what identifies them."""
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in found:
        model = cell.inputs["model"]
        models.setdefault(model["name"], {})[json.dumps(model, sort_keys=True)] = model
    return models


def _named(models: Sequence[dict[str, Any]]) -> str:
    return ", ".join(sorted(map(model_of, models)))


def differences(a: Cell, b: Cell) -> dict[str, tuple[str, str]]:
    """What the inputs of two cells differ in besides what was asked, in a few digits each."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted((a.inputs.keys() | b.inputs.keys()) - set(fields_of(ASKED)) | {"model"}):
        left, right = a.inputs.get(name), b.inputs.get(name)
        if name in FIELDS and FIELDS[name].any and None in (left, right):
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            parts = sorted(left.keys() | right.keys())
            found |= {f"{name}.{part}": (left.get(part), right.get(part)) for part in parts}
        else:
            found[name] = left, right
    expected = {"model.name"} if a.inputs["method"] == b.inputs["method"] else {"model.name", "method_code"}
    short = {what: (str(x)[:12], str(y)[:12]) for what, (x, y) in found.items() if what not in expected}
    return {what: (x, y) for what, (x, y) in short.items() if x != y}


def differing(found: Iterable[Pair], say: str, values: str) -> list[str]:
    """Sentences on what the two sides of some pairs differ in.

    Args:
        say: the sentence, of what differs and of its values. values: how a value of A and one of B are said.
    """
    changed: dict[str, set[str]] = {}
    for one in found:
        for what, sides in differences(one.a, one.b).items():
            changed.setdefault(what, set()).add(values.format(*sides))
    return [say.format(what, "; ".join(sorted(seen)[:3])) for what, seen in sorted(changed.items())]


def nearest_to(cell: Cell, others: Sequence[Cell]) -> str:
    """What keeps a cell from all others: how the most alike of them was asked differently."""
    mine = asked(cell.inputs)
    if not others:
        return ""
    other = min(others, key=lambda o: sum(mine[k] != v for k, v in asked(o.inputs).items()))
    theirs = asked(other.inputs)
    mine["model"], theirs["model"] = model_of(mine["model"]), model_of(theirs["model"])
    said = []
    for k in (k for k in fields_of(ASKED) if mine[k] != theirs[k]):
        left, right = mine[k], theirs[k]
        if isinstance(left, dict) and isinstance(right, dict):  # of many parameters, those that differ
            left, right = (
                {n: v for n, v in a.items() if n not in b or b[n] != v} for a, b in ((left, right), (right, left))
            )
        said.append(f"{k} {_short(left)} and {_short(right)}")
    return f"{describe(cell)} in {cell.source} and {describe(other)} in {other.source} differ in {', '.join(said)}"


def _short(item: Any) -> str:
    return str(item) if not isinstance(item, dict) else ":".join(f"{k}={v}" for k, v in item.items()) or "none"
