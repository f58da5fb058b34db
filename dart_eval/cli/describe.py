"""Methods and parts in words: what `dart-eval ls` prints and docs/methods.md holds."""

from __future__ import annotations

from dataclasses import Field

from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part, kind_of
from dart_eval.pruning.spelling import plain_fields, slot_names, slots, text_of


def tree(owner: Pruner | Part, path: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Return every part and field of a method, indented: what a user types, and what it means."""
    paths, rows = {id(part): where for where, part in slots(owner, path)}, []
    for name in slot_names(type(owner)):
        part = getattr(owner, name)
        where = paths[id(part)]
        rows.append(("  " * depth + f"{where}={part.name}", part.summary))
        for field in plain_fields(type(part)):
            value = text_of(getattr(part, field.name))
            rows.append(("  " * (depth + 1) + f"{where}.{field.name}={value}", _help(type(part), field)))
        rows += tree(part, "" if where == "mask" else where, depth + 1)
    return rows


def part_rows(cls: type[Part]) -> list[tuple[str, str]]:
    """Return a part and its fields with their defaults."""
    rows = [(f"{cls.slot}={cls.name}", cls.summary)]
    for field in plain_fields(cls):
        rows.append((f"  {cls.slot}.{field.name}={text_of(field.default)}", _help(cls, field)))
    for name in slot_names(cls):
        default = cls.__dataclass_fields__[name].default.name
        rows.append((f"  {name}={default}", "a part"))
    return rows


def _help(cls: type[Part], field: Field[object]) -> str:
    """Return the meaning of a field in one line, with its words and bounds."""
    kind, bounds = kind_of(cls, field.name), field.metadata
    if isinstance(kind, tuple):
        return f"{bounds['help']} ({', '.join(kind)})"
    low, high, above = bounds.get("least"), bounds.get("most"), bounds.get("above")
    said = [f"at least {low:g}" if low is not None else "", f"above {above:g}" if above is not None else ""]
    said.append(f"at most {high:g}" if high is not None else "")
    words = ", ".join(s for s in said if s)
    return f"{bounds['help']} ({words})" if words else bounds["help"]
