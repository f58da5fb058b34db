"""The values of a run's options that are more than one number or word: read as typed, or refused.

pydantic calls these readers. A ValueError is what is wrong with the value, `;` and the remedy: `options.checked` puts
the option and the value before it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from dart_eval.util.bits import OWN_BITS
from dart_eval.util.bits import parse as parse_bits
from dart_eval.util.errors import UserError
from dart_eval.util.text import LENGTHS, Json, items_of, short_repr

AUTO = "auto"  # as a batch size: as many as fit
STEPS = 100  # sparsities of a range, at most
DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16", "fp32": "float32", "float": "float32",
    "f32": "float32", "full": "float32",
}  # fmt: skip


def plain(value: object) -> Any:
    """Return a value of Python: numbers and arrays of numpy become plain, a path its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return str(value) if isinstance(value, Path) else value


def text(value: object) -> str:
    """Return a text."""
    if not isinstance(value, (str, Path)):
        raise ValueError("must be text; put it in quotes to pass it as text")
    if not str(value):
        raise ValueError("is empty; give a value, or leave it out")
    if "\0" in str(value):
        raise ValueError("contains a NUL character; remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
        raise ValueError("is not UTF-8; rename the file")
    return str(value)


def place(value: object) -> str:
    """Return the name of a file or folder; `~` in it is the user's home."""
    return os.path.expanduser(text(value))


def texts(value: object) -> tuple[str, ...]:
    """Return a list of texts."""
    return tuple(map(text, items_of(value)))


def places(value: object) -> tuple[str, ...]:
    """Return a list of names of files or folders."""
    return tuple(map(place, items_of(value)))


def dtype(value: object) -> object:
    """Return a number format, known by its usual short name too: bf16, fp16, half, fp32."""
    return DTYPES.get(value.lower(), value) if isinstance(value, str) else value


def amount(value: object) -> object:
    """Return a text as a number, or as `auto` of a batch size."""
    if not isinstance(value, str):
        return value
    return AUTO if value.strip().lower() == AUTO else number(value)


def methods(value: object) -> tuple[str, ...]:
    """Return methods as typed; `{"griffin": {"remask": "drift"}}` in its spelling in one line."""
    items = [{name: options} for name, options in value.items()] if isinstance(value, dict) else items_of(value)
    return tuple(map(_method, items))


def _method(item: object) -> str:
    if not isinstance(item, dict):
        if "=" in text(item).partition(":")[0]:
            raise ValueError("has a method without a name; join options with colons, as in dart:remask.window=8")
        return text(item)
    if len(item) != 1:
        raise ValueError("has a method with several names; put a dash before each method")
    ((name, options),) = item.items()
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"has no mapping as options of {name}; for example dart: {{remask: never}}")
    from dart_eval.pruning.registry import spelled

    return spelled(str(name), options or {})


def sparsities(value: object) -> tuple[float, ...]:
    """Return numbers in [0, 1), ranges of them in full."""
    if isinstance(value, dict):
        raise ValueError("must be a list; for example 0.5,0.7")
    from dart_eval.pruning.registry import check_sparsity  # not for `--help`: it takes a tenth of a second

    return tuple(check_sparsity(number) for item in items_of(value) for number in _sparsities(item))


def _sparsities(item: Any) -> list[float]:
    """Return a number, or the numbers of a range: `0.5:0.9:0.2` -> [0.5, 0.7, 0.9], each as it would be typed."""
    try:
        if isinstance(item, (bool, type(None))):
            raise TypeError
        if not isinstance(item, str) or ":" not in item:
            return [float(item)]
        first, last, step = (Decimal(part.strip()) for part in item.split(":"))
        if not (first <= last and step > 0 and (last - first) / step < STEPS):
            raise ValueError
    except (TypeError, ValueError, OverflowError, InvalidOperation):
        raise ValueError("has what is no number and no range FIRST:LAST:STEP; for example 0.5,0.7:0.9:0.1") from None
    if (last - first) % step:
        raise ValueError(f"has a range that does not reach {last}; choose a step that ends there")
    return [float(first + i * step) for i in range(int((last - first) / step) + 1)]


def ffn_bits(value: object) -> tuple[str, ...]:
    """Return bits of an FFN weight, each written in full: `16`, `4`, `4:64`."""
    roundings = [parse_bits(str(item)) for item in items_of(value)]
    if not roundings:
        raise ValueError("is empty; for example --ffn-bits 4; 16 is no rounding")
    return tuple(dict.fromkeys(str(OWN_BITS) if rounding is None else rounding.text for rounding in roundings))


def seeds(value: object) -> list[Any]:
    """Return one seed or several, each once.

    Of the four that lm-eval takes (Python, numpy, torch, few-shot), as in 0,1234,1234,1234, the first is meant.
    """
    items = [number(item) if isinstance(item, str) else item for item in items_of(value)]
    if not all(isinstance(item, (int, float, str)) for item in items):
        return [value]  # is refused as it was typed
    if len(items) == 4 and len(set(items[1:])) == 1:
        return items[:1]
    return list(dict.fromkeys(items)) or [value]


def number(text: str) -> float | str:
    """Return a whole number, another number, or the text, which is then refused under its option's name."""
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


# -- settings of generation --------------------------------------------------------------------------------------


def generation(value: object) -> str | None:
    """Return settings of generation in one spelling, `do_sample=true,temperature=0.5`: it stands in keys of cells."""
    settings = pairs("gen_kwargs", value)
    for name, item in settings.items():
        kind = KINDS.get(name)
        if kind and isinstance(item, str) and name != "until":  # in YAML 1e-1 and '64' are texts
            settings[name] = item = _guessed(item.strip())
        if not _finite(item):
            raise UserError(f"{name} {short_repr(item)} in gen_kwargs is not finite", "give a number")
        if kind and item is not None and not kind[0](item):
            raise UserError(f"{name} {short_repr(item)} in gen_kwargs must be {kind[1]}")
        if name in LENGTHS and isinstance(item, float):  # 8.0 and 8 are one setting, and one key
            settings[name] = int(item)
        if name == "do_sample" and isinstance(item, int):  # so are 1 and true
            settings[name] = bool(item)
    return ",".join(f"{name}={_literal(settings[name])}" for name in sorted(settings)) or None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(t, str) for t in value))


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # what each setting may be, and that in words
    "do_sample": (lambda v: isinstance(v, int) and v in (0, 1), "true or false"),
    "temperature": (_is_number, "a number"),
    "until": (_is_text, "a text or a list of texts, in quotes"),
    **dict.fromkeys(LENGTHS, (lambda v: _is_number(v) and v == int(v), "a whole number")),
}


def _finite(item: object) -> bool:
    """Return whether neither a value nor anything inside it is NaN or infinite."""
    inside = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
    return all(map(_finite, inside)) and not (isinstance(item, float) and not math.isfinite(item))


def pairs(name: str, value: object) -> Json:
    """Return the values of `a=1,b=[2, 3]` or JSON as lm-eval reads it, in one text or several, or of a mapping.

    Args:
        name: of the option, for messages.

    Raises:
        UserError: it is none of these, or a key is given twice.
    """
    if isinstance(value, dict):
        return {text(key): item for key, item in value.items()}
    said = ",".join(text(item) for item in (value if isinstance(value, list) else [value]) if item != "")

    def once(items: Sequence[tuple[str, Any]]) -> Json:
        found: Json = {}
        for key, item in items:
            if key in found:
                raise UserError(f"{key} is given twice in {name}", "leave one of them out")
            found[key] = item
        return found

    if said.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return pairs(name, json.loads(said, object_pairs_hook=once))
    split = [(item, *item.partition("=")) for item in _pieces(said)]
    for item, key, equals, _ in split:
        if not equals or not key.strip():
            raise UserError(f"{name} {item!r} is not KEY=VALUE", "write KEY=VALUE,KEY=VALUE")
    return once([(key.strip(), _guessed(told.strip())) for _, key, _, told in split])


def _pieces(text: str) -> list[str]:
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
    return str(value) if bare and _pieces(f"x={value},y") == [f"x={value}", "y"] else repr(value)
