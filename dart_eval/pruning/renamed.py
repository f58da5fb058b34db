"""Names of version 0.1, when a method had flat parameters: they go on working for one release, with a word.

`dart:window=8` is now `dart:remask.window=8`. This file goes with 0.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import cast
from dart_eval.pruning.spelling import Known, plain_fields
from dart_eval.util.errors import RenamedWarning, UserError

RENAMED = {
    "normalise": "score.norm", "aggregate": "score.average", "decay": "score.decay", "skip_first": "score.skip_first",
    "down_norm": "score.down_norm", "seed": "score.seed",
    "sensitivity": "allocation.sensitivity", "protect": "allocation.protect", "magnitude": "allocation.magnitude",
    "window": "remask.window", "sigma": "remask.sigma", "floor": "remask.floor", "patience": "remask.patience",
    "cooldown": "remask.cooldown", "min_windows": "remask.min_windows", "detect_skip_first": "remask.skip_first",
    "renew": "remask.act", "ring": "remask.ring", "dense_tokens": "remask.dense_tokens", "blend": "remask.blend",
    "memory": "remask.old", "reference": "remask.reference", "every_blend": "remask.every_blend",
    "down": "choice.write_share",
}  # fmt: skip
FACTORS = ("max", "mean", "combined", "product")
OLD = ("detect", "every", "stages", "compensate", *RENAMED)
TABLE = "table:"  # and a file


def new_names(method: Pruner, given: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """The parameters by today's names; a warning says what to write instead."""
    old = {k: v for k, v in given.items() if k in OLD or (k == "score" and str(v) in (*FACTORS, "magnitude"))}
    found = {k: v for k, v in given.items() if k not in old}
    if str(found.get("allocation", "")).startswith(TABLE):
        found["allocation.file"] = found["allocation"][len(TABLE) :]
        found["allocation"] = "table"
    if not old:
        return found
    new = _translated(method, old, found, known)
    if twice := set(new) & set(found):
        raise UserError(f"{method.name}: {sorted(twice)[0]} is given twice", "leave the old name out")
    said = ":".join([method.name, *(f"{k}={_text(v)}" for k, v in new.items())])
    was = ":".join(f"{k}={_text(v)}" for k, v in old.items())
    text = f"{method.name}:{was} uses names of version 0.1, which the next one will not know; write {said}"
    warnings.warn(text, RenamedWarning, stacklevel=4)
    return {**found, **new}


def _translated(method: Pruner, old: Mapping[str, Any], given: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """Old parameters as paths. given: those by today's names."""
    new: dict[str, Any] = {}
    if "score" in old:
        new["score.vocabulary"] = "none" if old["score"] == "magnitude" else old["score"]
    detects = cast("detect", bool, old.get("detect", method.mask.remask.watches))
    every = cast("every", int, old.get("every", method.mask.remask.every))
    if "detect" in old and not detects:
        new["remask"] = "every" if every else "never"
    elif "detect" in old:
        new["remask"] = "drift"
    if "every" in old:
        new["remask.every" if detects else "remask.tokens"] = old["every"]
        if not detects and not every:
            del new["remask.tokens"]
    if new.get("remask") == "every":  # as they were: that part has defaults of its own
        new |= {f"remask.{n}": getattr(method.mask.remask, n) for n in ("ring", "old") if method.mask.remask.watches}
    if "stages" in old and cast("stages", float, old["stages"]) > 1:
        new |= {"choice": "gate-up", "choice.mask_ratio": old["stages"]}
    elif "stages" in old:
        new["choice"] = "none"
    if "compensate" in old:
        new["compensation"] = "mean" if cast("compensate", bool, old["compensate"]) else "none"
    for name, value in old.items():
        if name in RENAMED and (detects or name != "blend"):  # which was that after an alarm
            path = RENAMED[name] if detects or name != "every_blend" else "remask.blend"
            if not method.mask.remask.watches or _acts(path, {**given, **new}, method, known):
                new[path] = value
    return new


def _acts(path: str, given: Mapping[str, Any], method: Pruner, known: Known) -> bool:
    """Whether the part that a parameter is now of will be there: `dart` could be given all of them before."""
    slot, _, field = path.partition(".")
    cls = known[slot].get(str(given.get(slot, method.params()[slot])))
    return cls is None or field in [f.name for f in plain_fields(cls)]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
