"""What a file of results holds is checked once, where it is read, so that nothing later trips over it.

A digest shows that a file was cut or changed, not that what it says makes sense: other programs write records too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

DEEPEST = 32  # levels of lists and dicts; ours have five
LARGEST = 2**63  # beyond it a whole number has no float

Check = Callable[[Any, str], None]


def parsed(text: str | bytes) -> Any:
    """JSON as plain data that can be written, counted and shown.

    Raises:
        ValueError: it is no JSON, nested deeper than any file of ours, or holds a number or text beyond all use.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level, depth = [data], 0
    while level:  # level by level: a file that is nested on purpose must not exhaust our own stack
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _encodable(item)
            elif isinstance(item, int) and abs(item) >= LARGEST:
                raise ValueError(f"a number of {len(str(abs(item)))} digits")
        level = below
    return data


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a text that is no Unicode: {text[:40]!r}") from None


# -- checks: each takes a value and the words for where it stands, and raises ValueError ----------------------------


def _kind(words: str, fits: Callable[[Any], bool]) -> Check:
    def check(item: Any, where: str) -> None:
        if not fits(item):
            raise ValueError(f"{where} is {_short(item)}, not {words}")

    return check


def _short(item: Any) -> str:
    said = json.dumps(item)
    return said if len(said) <= 40 else f"{said[:37]}..."


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


text = _kind("a text", lambda item: isinstance(item, str))
text_or_none = _kind("a text or null", lambda item: item is None or isinstance(item, str))
number = _kind("a number", _is_number)
count = _kind("a whole number", lambda item: isinstance(item, int) and not isinstance(item, bool))
share = _kind("a number from 0 to 1", lambda item: _is_number(item) and 0 <= item <= 1)
flag = _kind("true or false", lambda item: isinstance(item, bool))
flag_or_none = _kind("true, false or null", lambda item: item is None or isinstance(item, bool))
mapping = _kind("a mapping", lambda item: isinstance(item, dict))
listing = _kind("a list", lambda item: isinstance(item, list))


def each(check: Check) -> Check:
    """A check of every entry of a list."""

    def checked(items: Any, where: str) -> None:
        listing(items, where)
        for i, item in enumerate(items):
            check(item, f"{where}[{i}]")

    return checked


def row(*checks: Check) -> Check:
    """A check of a list of so many entries, one each."""

    def checked(items: Any, where: str) -> None:
        listing(items, where)
        if len(items) != len(checks):
            raise ValueError(f"{where} has {len(items)} entries, not {len(checks)}")
        for i, (check, item) in enumerate(zip(checks, items, strict=True)):
            check(item, f"{where}[{i}]")

    return checked


def values(check: Check) -> Check:
    """A check of every value of a mapping."""

    def checked(items: Any, where: str) -> None:
        mapping(items, where)
        for name, item in items.items():
            check(item, f"{where}.{name}")

    return checked


def fields(needed: Mapping[str, Check], known: Mapping[str, Check] | None = None, rest: Check | None = None) -> Check:
    """A check of a mapping: entries that it must have, that it may have, and all others."""

    def checked(items: Any, where: str) -> None:
        mapping(items, where)
        for name in needed:
            if name not in items:
                raise ValueError(f"{where} lacks {name!r}")
        checks = {**needed, **(known or {})}
        for name, item in items.items():
            check = checks.get(name, rest)
            if check is not None:
                check(item, f"{where}.{name}")

    return checked


# -- what our files hold ---------------------------------------------------------------------------------------------

batch = row(mapping, number, number)  # of a journal
plan = fields({"cells": values(fields({"title": text, "seconds": number}))})
