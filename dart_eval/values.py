"""The values of a run's configuration: each in its kind, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dart_eval.errors import UserError
from dart_eval.evaluation.batching import check_batch_size
from dart_eval.pruning.registry import spelled
from dart_eval.yamls import shown

MOST = 2**32  # no count of anything is as large
_KINDS: dict[str, type] = {
    **dict.fromkeys(("num_fewshot", "limit", "seed", "max_length", "chunk", "shards"), int),
    **dict.fromkeys(("gpus_per_cell", "cpus_per_cell"), float),
    **dict.fromkeys(("chat_template", "force", "share_prefix", "trust_remote_code", "confirm_run_unsafe_code"), bool),
}


def checked(key: str, value: Any) -> Any:
    """A value in the kind that `RunConfig` has of its key, from YAML, a command line or Python.

    Raises:
        UserError: it is of another kind, empty, or beyond all use.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's numbers and arrays
    if key == "sparsity":
        if isinstance(value, dict):
            raise UserError(f"sparsity must be a list, not {shown(value)}", "for example 0.5,0.7")
        return tuple(_sparsity(item) for item in _items(value))
    if key == "method":
        items = [{name: parts} for name, parts in value.items()] if isinstance(value, dict) else _items(value)
        return tuple(_method(item) for item in items)
    if key == "tasks":
        return tuple(_text(key, item) for item in _items(value))
    kind: Any = _KINDS.get(key, str)
    if key == "batch_size":
        value = check_batch_size(value if isinstance(value, str) or _is_count(value) else shown(value))
        kind = type(value)
    if kind is str:
        return _text(key, value)
    if kind is float and type(value) is int and abs(value) < MOST:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key} must be {kind.__name__}, not {shown(value)}")
    if kind is int and not _is_count(value):
        raise UserError(f"{key} is {'too large' if value > 0 else 'too small'}", "give a number below 2^32")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < MOST


def _items(value: Any) -> list[Any]:
    """A list, given as one, as text with commas, or as a single value; empty texts are none."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    items = [i.strip() if isinstance(i, str) else i for i in items]
    return [i for i in items if not (isinstance(i, str) and i == "")]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, (str, Path)):
        kind = "text or a list of texts" if key in ("method", "tasks") else "text"
        raise UserError(f"{key} must be {kind}, not {shown(value)}", "put quotes around it if it is meant so")
    text = str(value)
    if "\0" in text:
        raise UserError(f"{key} holds a NUL character", "leave it out")
    if not text and key != "cue":
        raise UserError(f"{key} is empty", "give a value, or leave the key out")
    return text


def _method(item: Any) -> str:
    """A method as typed; of `{"griffin": {"remask": "drift"}}` its spelling in one line."""
    if not isinstance(item, dict):
        return _text("method", item)
    if len(item) != 1:
        raise UserError(f"method {shown(item)} has several names", "put a dash before each method")
    ((name, parts),) = item.items()
    if parts is not None and not isinstance(parts, dict):
        raise UserError(f"method {name} takes keys and values, not {shown(parts)}", "as in griffin: {remask: drift}")
    return spelled(str(name), parts or {})


def _sparsity(item: Any) -> float:
    try:
        if isinstance(item, (bool, type(None))):
            raise TypeError
        return float(item)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"sparsity {shown(item)} is not a number or a list of numbers", "for example 0.5,0.7") from None
