"""The names of methods: the built-in ones, and classes of other packages by the entry point `dart_eval.methods`.

What is asked for is checked here as far as torch is not needed for it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TYPE_CHECKING, Any

from dart_eval.util.errors import UserError, naming, nearest
from dart_eval.util.retired import retired

if TYPE_CHECKING:
    from dart_eval.pruning.method import Method

log = logging.getLogger(__name__)

BUILT_IN = {  # name -> module in `pruning.methods`, class
    "dense": ("dense", "Dense"),
    "random": ("griffin", "Random"),
    "magnitude": ("griffin", "Magnitude"),
    "static": ("griffin", "Static"),
    "wanda-sp": ("griffin", "WandaSP"),
    "flap": ("flap", "Flap"),
    "griffin": ("griffin", "Griffin"),
    "dart": ("dart", "Dart"),
    "dart-code": ("dart", "DartCode"),
    "cats": ("cats", "Cats"),
    "m-countdown": ("cats", "MCountdown"),
    "oracle-token": ("cats", "OracleToken"),
    "teal": ("teal", "Teal"),
    "wina": ("teal", "Wina"),
    "grinqh": ("columns", "Grinqh"),
    "decdec": ("columns", "DecDEC"),
    "graded-both": ("both", "GradedBoth"),
    "rounding": ("rounding", "RoundedWeights"),
    "oracle": ("griffin", "Oracle"),
    "noise": ("noise", "Noise"),
    "larosa": ("larosa", "Larosa"),
    "rsparse": ("rsparse", "RSparse"),
    "sirius": ("sirius", "Sirius"),
}
TABLE = "table:"  # and a file: `allocation=table:FILE`


def names() -> list[str]:
    """Return the names of all methods, the built-in ones first. Nothing is imported."""
    return [*dict.fromkeys([*BUILT_IN, *offered(entry_points)])]


def methods() -> dict[str, type[Method]]:
    """Return all methods by name: the built-in ones, then those of other installed packages.

    A method that cannot be imported is logged and skipped; the others must go on working.
    """
    from dart_eval.pruning.method import Method

    classes = {name: _built_in(name) for name in BUILT_IN}
    for name, entry in offered(entry_points).items():
        if name in classes:
            log.error("method %s of another package has the name of a built-in one: left out", name)
            continue
        try:
            cls = entry.load()
        except Exception as error:
            log.error("method %s of another package cannot be imported: %s", name, error)
            continue
        if not (isinstance(cls, type) and issubclass(cls, Method)) or cls in (Method, *classes.values()):
            log.error("method %s of another package is no new class of dart_eval.Method: left out", name)
            continue
        cls.name = name  # records and commands call it by the name that finds it
        classes[name] = cls
    return classes


def _built_in(name: str) -> type[Method]:
    module, cls = BUILT_IN[name]
    found: type[Method] = getattr(importlib.import_module(f"dart_eval.pruning.methods.{module}"), cls)
    return found


@functools.cache  # a search of all installed packages takes milliseconds, and a spelling is read often
def offered(search: Callable[..., EntryPoints]) -> dict[str, EntryPoint]:
    """Return what other packages offer, by name. search: `importlib.metadata.entry_points`."""
    return {entry.name: entry for entry in search(group="dart_eval.methods")}


def check_name(name: str) -> None:
    """Refuse an unknown name. Nothing is imported.

    Raises:
        UserError: with the nearest names.
    """
    if name not in names():
        near = nearest(name, names()) or "`dart-eval ls methods` lists them"
        raise retired("method", name) or UserError(f"unknown method {name!r}", near)


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity if it is a number in [0, 1).

    Raises:
        UserError: it is not.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise UserError(f"sparsity {sparsity!r} is not a number", "for example 0.5")
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} is outside [0, 1)",
            "it is the share of the FFN weights that a token does not read: write 0.7 for 70 %",
        )
    return sparsity


def make(name: str, settings: Mapping[str, object] | None = None) -> Method:
    """Return the method of that name, with other values of its options.

    Args:
        settings: values by path, which may be nested: `{"remask.window": 8}`, `{"remask": {"window": 8}}`.

    Raises:
        UserError: unknown name (nearest ones offered), unknown option, or a bad value.
    """
    check_name(name)
    cls = _built_in(name) if name in BUILT_IN else methods().get(name)
    if cls is None:
        raise UserError(f"method {name!r} of another package cannot be used", "install that package anew")
    if not settings:
        return cls()
    given = dict(_flattened(settings))
    if str(table := given.get("allocation", "")).startswith(TABLE):
        if "allocation.file" in given:
            raise UserError("allocation.file is given twice", "leave one of them out")
        given |= {"allocation": "table", "allocation.file": str(table).removeprefix(TABLE)}
    with naming(f"{name}: "):
        options = cls.options()
        for path in given:
            if path not in options:
                owner, dot, _ = path.partition(".")
                mistyped = dot and any(known.startswith(f"{owner}.") for known in options)
                near = nearest(path, options) if options else "it has none"
                raise (None if mistyped else retired("setting", owner)) or UserError(
                    f"there is no option {path!r}", near
                )
        method = cls(**{options[path].field: value for path, value in given.items()})
        for path in given.keys() - method.valid_options().keys():
            owner = path.partition(".")[0]
            raise UserError(f"{path} goes with {owner}={options[path].when}", "write that, or leave it out")
    return method


def _flattened(settings: Mapping[str, object], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths and values of nested mappings."""
    for key, value in settings.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flattened(value, where)
        elif value is None:
            raise UserError(f"{where} has no value", "give one, or leave it out")
        else:
            yield where, value


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Parse the spelling of a method into its name and settings.

    `dart:remask.window=8:remask.act=off` -> ("dart", {"remask.window": "8", "remask.act": "off"}).

    Values may hold colons (`allocation=table:FILE`): one separates settings only where a name and "=" follow.
    """
    name, colon, rest = spec.strip().partition(":")
    if name.strip() not in names():
        name = name.lower().replace("_", "-")  # GRIFFIN, wanda_sp
    settings: dict[str, str] = {}
    for pair in re.split(r":(?=\s*[\w.]*\s*=)", rest) if colon else []:  # values may hold colons
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise UserError(f"{spec!r} is not a method", "write NAME or NAME:key=value:key=value")
        if key.strip() in settings:
            raise UserError(f"{key.strip()} is given twice", "leave one of them out")
        settings[key.strip()] = value.strip()
    return name.strip(), settings
