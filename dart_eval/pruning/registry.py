"""Names of methods. Built-in ones are listed here; others come through the entry point `dart_eval.methods`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from dart_eval.errors import UserError, nearest
from dart_eval.pruning.method import Method, build
from dart_eval.pruning.methods.dart import Dart, DartCode, DartPlus
from dart_eval.pruning.methods.dense import Dense
from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.pruning.methods.magnitude import Magnitude
from dart_eval.pruning.methods.oracle import Oracle
from dart_eval.pruning.methods.random import Random
from dart_eval.pruning.methods.wanda_sp import WandaSp

log = logging.getLogger(__name__)

BUILT_IN: tuple[type[Method], ...] = (Dense, Random, Magnitude, WandaSp, Griffin, Dart, DartCode, DartPlus, Oracle)


def methods() -> dict[str, type[Method]]:
    """Every known method by name: the built-in ones, then those of other installed packages.

    A package whose method cannot be imported is left out with a warning; the others must go on working.
    """
    known = {cls.name: cls for cls in BUILT_IN}
    for entry in entry_points(group="dart_eval.methods"):
        if entry.name in known:
            continue
        try:
            known[entry.name] = entry.load()
        except Exception as error:
            log.error("method %s of another package cannot be imported: %s", entry.name, error)
    return known


def make(name: str, params: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with the given parameters.

    Raises:
        UserError: unknown name (nearest ones offered), unknown parameter or bad value.
    """
    known = methods()
    if name not in known:
        raise UserError(f"unknown method {name!r}", nearest(name, known))
    return build(known[name], params or {})


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """`dart:allocation=uniform:window=8` -> ("dart", {"allocation": "uniform", "window": "8"}).

    Values may hold colons (`dart:allocation=table:FILE`): one separates parameters only where a name and "=" follow.
    """
    name, colon, rest = spec.strip().partition(":")
    params = {}
    for pair in re.split(r":(?=\s*\w*\s*=)", rest) if colon else []:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise UserError(f"{spec!r} is not a method", "write NAME or NAME:key=value:key=value")
        params[key.strip()] = value.strip()
    return name.strip(), params
