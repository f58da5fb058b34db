"""Which cells of two sets answer the same question, and what two cells differ in.

The model is part of the question. So cells of the same weights go together; and where neither side has the other's
model, one checkpoint goes with another of its name, which is said: a changed model is what a comparison may be about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from dart_eval.errors import UserError
from dart_eval.results.inputs import ASKED, FIELDS, asked, identity, model_of
from dart_eval.results.inputs import names as fields_of
from dart_eval.results.outcomes import Cell, describe


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
                    f"--models {model_of(alone[0])},{model_of(beside[0])}",
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
    found = {}
    for name, left, right in _flat(a.inputs, b.inputs):
        if left != right and not (name == "method_code" and a.inputs["method"] != b.inputs["method"]):
            found[name] = (left, right)
    return found


def _flat(a: dict[str, Any], b: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    for name in sorted((a.keys() | b.keys()) - set(fields_of(ASKED)) | {"model"}):
        left, right = a.get(name), b.get(name)
        if name in FIELDS and FIELDS[name].any and None in (left, right):
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            for part in sorted(left.keys() | right.keys()):
                if (name, part) != ("model", "name"):
                    yield f"{name}.{part}", str(left.get(part))[:12], str(right.get(part))[:12]
        else:
            yield name, str(left)[:12], str(right)[:12]


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
