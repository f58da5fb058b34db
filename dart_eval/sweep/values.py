"""The values of a run's configuration that are more than one number or word: read as typed, or refused.

pydantic calls those that `options` names. It collects only ValueErrors, so `Refused` carries ours through it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import ValidationInfo

from dart_eval.util.bits import OWN_BITS
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError
from dart_eval.util.text import LENGTHS, Json, items_of, short_repr

FIELDS = "dart:remask=never:allocation=uniform"  # an example
MOST = 2**32  # no count of anything is as large
PATHS = ("output", "data_dir", "calibration", "include_path")  # `~` in them is the user's home; a model's name stays
P = ParamSpec("P")
T = TypeVar("T")
AUTO = "auto"  # as a batch size: as many as fit
STEPS = 100  # sparsities of a range, at most
DATA_SET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # as --calibration takes it
TEXT_FILES = (".txt", ".md", ".json", ".jsonl")  # no data set is called so
DATA_SET_TOKENS = 16384  # that a calibration reads of one
DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16", "fp32": "float32", "float": "float32",
    "f32": "float32", "full": "float32",
}  # fmt: skip
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of generation: what each may be, and that in words
    "do_sample": (lambda v: isinstance(v, int) and v in (0, 1), "true or false"),
    "temperature": (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number"),
    "until": (
        lambda v: isinstance(v, str) or (isinstance(v, (list, tuple)) and all(isinstance(t, str) for t in v)),
        "a text or a list of texts, in quotes",
    ),
    **dict.fromkeys(LENGTHS, (
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == int(v), "a whole number",
    )),
}  # fmt: skip
DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")


class Refused(ValueError):
    """A UserError on its way through pydantic."""

    def __init__(self, told: UserError) -> None:
        super().__init__(str(told))
        self.told = told


def _refusing(read: Callable[P, T]) -> Callable[P, T]:
    """Return the function with its UserErrors wrapped for pydantic."""

    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except UserError as error:
            raise Refused(error) from None

    return reading


def plain(value: object) -> Any:
    """Return a value of Python: numbers and arrays of numpy become plain, a path its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return str(value) if isinstance(value, Path) else value


@_refusing
def text(value: object, info: ValidationInfo) -> str | None:
    """Return a text that is not empty."""
    if value is None:
        return None
    name = str(info.field_name)
    value = _text(name, value)
    value = os.path.expanduser(value) if name in PATHS else value
    if not value:
        raise UserError(f"{name} is empty", "give a value, or leave the key out")
    return value


def dtype(value: object) -> Any:
    """Return a number format, known by its usual short name too: bf16, fp16, half, fp32."""
    return DTYPES.get(value.lower(), value) if isinstance(value, str) else value


@_refusing
def device(value: str) -> str:
    """Return a device as torch spells it; whether it exists shows later."""
    if not DEVICE.fullmatch(value):
        raise UserError(f"unknown device {value!r}", "auto, cpu, cuda, cuda:1, mps")
    return value


@_refusing
def texts(value: object, info: ValidationInfo) -> tuple[str, ...]:
    """Return a list of texts."""
    name = str(info.field_name)
    found = (_text(name, item, "text or a list of texts") for item in items_of(value))
    return tuple(os.path.expanduser(item) if name in PATHS else item for item in found)


@_refusing
def methods(value: object) -> tuple[str, ...]:
    """Return methods as typed; `{"griffin": {"remask": "drift"}}` in its spelling in one line."""
    items = [{name: parts} for name, parts in value.items()] if isinstance(value, dict) else items_of(value)
    return tuple(_method(item) for item in items)


@_refusing
def sparsities(value: object) -> tuple[float, ...]:
    """Return numbers in [0, 1), ranges of them in full."""
    if isinstance(value, dict):
        raise UserError(f"sparsity must be a list, not {short_repr(value)}", "for example 0.5,0.7")
    from dart_eval.pruning.registry import check_sparsity  # not for `--help`: it takes a tenth of a second

    return tuple(check_sparsity(s) for item in items_of(value) for s in _sparsity(item))


@_refusing
def ffn_bits(value: object) -> tuple[str, ...]:
    """Return bits of an FFN weight, each written in full: `16`, `4`, `4:64`."""
    made = [parse_bits(str(item)) for item in items_of(value)]
    if not made:
        raise UserError("ffn_bits is empty", "for example --ffn-bits 4; 16 is no rounding")
    return tuple(dict.fromkeys(str(OWN_BITS) if bits is None else bits.text for bits in made))


@_refusing
def limit(value: object) -> float | None:
    """Return a number of documents, or a share of them below 1."""
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    if type(value) is not int:
        raise UserError(
            f"limit must be a whole number, or a share of the documents below 1, not {short_repr(value)}",
            "for example 100 or 0.1",
        )
    if value < 1:
        raise UserError(f"--limit {short_repr(value)} must be at least 1, or a share of the documents such as 0.1")
    if value >= MOST:
        raise UserError("limit is too large", "give a number below 2^32")
    return value


@_refusing
def generation(value: object, info: ValidationInfo) -> str | None:
    """Return settings of generation in one spelling, `do_sample=true,temperature=0.5`."""
    if value is None:
        return None
    found = pairs(str(info.field_name), value)
    for name, item in found.items():
        if name in SETTINGS and name != "until" and isinstance(item, str):  # in YAML 1e-1 and '64' are texts
            found[name] = item = _guessed(item.strip())
        if not _finite(item):
            raise UserError(f"{name} {short_repr(item)} in {info.field_name} is not finite", "give a number")
        if item is not None and name in SETTINGS and not SETTINGS[name][0](item):
            raise UserError(f"{name} {short_repr(item)} in {info.field_name} must be {SETTINGS[name][1]}")
        if name in LENGTHS and isinstance(item, float):  # 8.0 and 8 are one setting, and one key
            found[name] = int(item)
    if isinstance(found.get("do_sample"), int):  # so are 1 and true
        found["do_sample"] = bool(found["do_sample"])
    return ",".join(f"{name}={_literal(found[name])}" for name in sorted(found)) or None


def _finite(item: object) -> bool:
    """Return whether neither a value nor anything inside it is NaN or infinite."""
    inside = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
    return all(map(_finite, inside)) and not (isinstance(item, float) and not math.isfinite(item))


def pairs(name: str, value: object) -> Json:
    """Return the values of `a=1,b=[2, 3]` or JSON as lm-eval reads it, in one text or several, or of a mapping.

    Args:
        name: of the option, for messages.
    """
    example = f"write {name.replace('_', '-')} as KEY=VALUE,KEY=VALUE"
    if isinstance(value, dict):
        return {_text(f"a key of {name}", key): item for key, item in value.items()}
    said = ",".join(_text(name, text) for text in (value if isinstance(value, list) else [value]))
    if said.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return pairs(name, json.loads(said, object_pairs_hook=functools.partial(_once, name)))
    found: list[tuple[str, Any]] = []
    for item in _apart(said):
        key, equals, told = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{name} {item!r} is not KEY=VALUE", example)
        found.append((key.strip(), _guessed(told.strip())))
    return _once(name, found)


def _once(name: str, items: Sequence[tuple[str, Any]]) -> Json:
    """Return keys with their values. name: of the option.

    Raises:
        UserError: a key is given twice.
    """
    found: Json = {}
    for key, value in items:
        if key in found:
            raise UserError(f"{key} is given twice in {name}", "leave one of them out")
        found[key] = value
    return found


def seeds(value: object) -> list[Any]:
    """Return one seed or several, each once.

    Of the four that lm-eval takes (Python, numpy, torch, few-shot), as in 0,1234,1234,1234, the first is meant.
    """
    items = [number(item) if isinstance(item, str) else item for item in items_of(value)]
    if not all(isinstance(item, (int, float, str)) for item in items):
        return [value]  # is refused with its own words
    if len(items) == 4 and len(set(items[1:])) == 1:
        return items[:1]
    return list(dict.fromkeys(items)) or [value]


def number(text: str) -> float | str:
    """Return a whole number, another number, or the text, which is then refused under its option's name."""
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


@_refusing
def batch_size(value: object) -> int | str:
    """Return a batch size as given, if it is one."""
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return AUTO
    try:
        if not isinstance(value, (int, str)) or isinstance(value, bool) or not 1 <= int(value) < MOST:
            raise ValueError
        return int(value)
    except ValueError:
        said = value if isinstance(value, str) else short_repr(value)
        raise UserError(f"--batch-size {said} is not a batch size", "give a whole number from 1, or auto") from None


def no_text(name: str, value: object, wanted: str = "text") -> UserError:
    """Return the error for a value that is no text."""
    return UserError(f"{name} must be {wanted}, not {short_repr(value)}", "put it in quotes to pass it as text")


def _text(name: str, value: object, wanted: str = "text") -> str:
    if not isinstance(value, (str, Path)):
        raise no_text(name, value, wanted)
    if "\0" in str(value):
        raise UserError(f"{name} contains a NUL character", "remove it")
    if any("\ud800" <= c <= "\udfff" for c in str(value)):
        raise UserError(f"{name} is not UTF-8: {str(value)!a}", "rename the file")
    return str(value)


def _method(item: object) -> str:
    if not isinstance(item, dict):
        text = _text("method", item, "text or a list of texts")
        if text.lower() == "all":
            raise UserError("--method all does not exist", "give names; `dart-eval ls methods` lists them")
        if "=" in text and "=" in text.partition(":")[0]:
            raise UserError(f"method {text!r} has no name", "join a method's options with colons, as in " + FIELDS)
        return text
    if len(item) != 1:
        raise UserError(f"method {short_repr(item)} has several names", "put a dash before each method")
    ((name, parts),) = item.items()
    if parts is not None and not isinstance(parts, dict):
        raise UserError(
            f"method {name} takes keys and values, not {short_repr(parts)}", "as in griffin: {remask: drift}"
        )
    from dart_eval.pruning.registry import spelled

    return spelled(str(name), parts or {})


def _sparsity(item: Any) -> list[float]:
    """Return a number, or the numbers of a range."""
    if isinstance(item, str) and ":" in item:
        return _range(item)
    try:
        if isinstance(item, (bool, type(None))):
            raise TypeError
        return [float(item)]
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"sparsity {short_repr(item)} is not a number or a list of numbers", "for example 0.5,0.7"
        ) from None


def _apart(text: str) -> list[str]:
    """Return the pieces between commas outside brackets and quotes; quotes open where a value begins."""
    pieces, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if quote:
            quote, escaped = "" if letter == quote and not escaped else quote, letter == "\\" and not escaped
        elif letter in "\"'" and pieces[-1].rstrip()[-1:] in ("", *"=,[({:"):
            quote = letter
        depth += (letter in "[({") - (letter in "])}") if not quote else 0
        if letter == "," and not quote and depth <= 0:
            pieces.append("")
            depth = 0  # a bracket that nothing opened closes nothing in the next piece
        else:
            pieces[-1] += letter
    return [piece for piece in pieces if piece.strip()]


def _guessed(said: str) -> Any:
    """Return a value of the type that its text looks like, as lm-eval guesses it."""
    if said.lower() in ("true", "false"):
        return said.lower() == "true"
    for read in (int, float, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return read(said)
    return said


def _literal(value: object) -> str:
    """Return the text of a value that `pairs` reads as the same value, beside others too."""
    if isinstance(value, bool):
        return str(value).lower()
    bare = isinstance(value, str) and value != "" and value.strip() == value and _guessed(value) == value
    return str(value) if bare and _apart(f"x={value},y") == [f"x={value}", "y"] else repr(value)


def _range(item: str) -> list[float]:
    """`0.5:0.9:0.1` -> [0.5, 0.6, 0.7, 0.8, 0.9], each as it would be typed."""
    example = "write FIRST:LAST:STEP, for example 0.5:0.9:0.1"
    try:
        first, last, step = (Decimal(part.strip()) for part in item.split(":"))
        if not (first <= last and step > 0 and (last - first) / step < STEPS):
            raise ValueError
    except (InvalidOperation, ValueError):
        raise UserError(f"sparsity {short_repr(item)} is not a range", example) from None
    if (last - first) % step:
        raise UserError(f"sparsity range {item} does not reach {last}", "choose a step that ends there")
    return [float(first + i * step) for i in range(int((last - first) / step) + 1)]


def may_be_text(name: str) -> bool:
    """Return whether a name can be a calibration text: a file, or the name of a data set."""
    return Path(name).is_file() or (DATA_SET.fullmatch(name) is not None and Path(name).suffix not in TEXT_FILES)
