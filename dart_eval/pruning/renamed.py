"""Names of version 0.1, when a method had flat parameters: they go on working for one release, with a word.

`dart:window=8` is now `dart:remask.window=8`. This file goes with 0.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dart_eval.errors import RenamedWarning, UserError
from dart_eval.pruning.parts.base import cast

if TYPE_CHECKING:
    from dart_eval.pruning.method import Pruner

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


def new_names(method: Pruner, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by today's names; a warning says what to write instead."""
    old = {k: v for k, v in given.items() if k in OLD or (k == "score" and str(v) in (*FACTORS, "magnitude"))}
    found = {k: v for k, v in given.items() if k not in old}
    if str(found.get("allocation", "")).startswith(TABLE):
        found["allocation.file"] = found["allocation"][len(TABLE) :]
        found["allocation"] = "table"
    if not old:
        return found
    new = _translated(method, old)
    if twice := set(new) & set(found):
        raise UserError(f"{method.name}: {sorted(twice)[0]} is given twice", "leave the old name out")
    said = ":".join([method.name, *(f"{k}={_text(v)}" for k, v in new.items())])
    was = ":".join(f"{k}={_text(v)}" for k, v in old.items())
    text = f"{method.name}:{was} uses names of version 0.1, which the next one will not know; write {said}"
    warnings.warn(text, RenamedWarning, stacklevel=4)
    return {**found, **new}


def _translated(method: Pruner, old: Mapping[str, Any]) -> dict[str, Any]:
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
        if name in RENAMED and not ("detect" in old and _idle(name, detects, every)) and not _no_choice(name, new):
            path = RENAMED[name] if detects or name != "every_blend" else "remask.blend"
            new[path] = value
    return new


def _idle(name: str, detects: bool, every: int) -> bool:
    """Whether a parameter of the detector has nothing to act on."""
    kept = ("ring", "memory", "every_blend") if every else ()
    return not detects and RENAMED[name].startswith("remask.") and name not in kept


def _no_choice(name: str, new: Mapping[str, Any]) -> bool:
    return RENAMED[name].startswith("choice.") and new.get("choice") == "none"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
