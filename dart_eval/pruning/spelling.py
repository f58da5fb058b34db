"""How a user spells a method: paths reach every part of it, and every field of a part.

Example: `griffin:remask=drift:remask.window=8` is GRIFFIN's composition with another part in the slot `remask`, and
another value in that part's field `window`. In Python it is `make("griffin", {"remask": OnDrift(window=8)})`, in YAML
`griffin: {remask: {part: drift, window: 8}}`. Nothing here knows a method by name.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from dart_eval.pruning.part import Part, cast, kind_of, slot_of
from dart_eval.util.errors import UserError, naming, nearest

# Slots of parts, addressed by their names alone.
OWNERS = {"score": "mask", "draw": "mask", "remask": "mask", "image": "choice"}

Method = TypeVar("Method", bound=Any)
Known = Mapping[str, Mapping[str, type[Part]]]  # slot -> name -> part, of all there are


def changed(
    base: Method, given: Mapping[str, Any], known: Known, kind: Callable[[Method, list[type[Part]]], type[Method]]
) -> Method:
    """The composition `base` with other parts and values in it.

    Args:
        kind: what a method becomes with parts of these classes in its slots.
        given: path -> value: for a slot the name of a part, a `Part`, or a mapping with its fields (and `part`, its
            name); for a field its value.

    Raises:
        UserError: a path, a part or a value that does not exist.
    """
    tree: dict[str, Any] = {}
    for path, value in given.items():
        steps = str(path).split(".")
        if steps[0] in OWNERS and steps[0] in known:
            steps = [OWNERS[steps[0]], *steps]
        if len(steps) > 1 and steps[-1] == "part":
            steps = steps[:-1]
        _merge(tree, steps, value, str(path))
    with naming(f"{base.name}: "):
        return dataclasses.replace(_filled(base, kind(base, _parts(tree, known)), tree, known), base=base.base or base)


def _parts(tree: Mapping[str, Any], known: Known) -> list[type[Part]]:
    """The classes of the parts that are to fill slots of the method itself, as far as there are such parts."""
    found = []
    for slot, inner in tree.items():
        wanted = inner.get("part")
        cls = type(wanted) if isinstance(wanted, Part) else known.get(slot, {}).get(str(wanted))
        found += [cls] if cls is not None else []
    return found


def _merge(tree: dict[str, Any], steps: list[str], value: Any, path: str) -> None:
    """Put a value into nested mappings. The part that fills a slot stands under `part`."""
    for step in steps:
        tree = tree.setdefault(step, {})
    if value is None:
        raise UserError(f"{path} has no value", "give one, or leave it out")
    if not isinstance(value, Mapping):
        value = {"part": value}
    for key, inner in value.items():
        if key != "part":
            _merge(tree, [str(key)], inner, f"{path}.{key}")
        elif "part" in tree:
            raise UserError(f"{path} is given twice", "leave one of them out")
        else:
            tree["part"] = inner


def flattened(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of nested mappings, in which `part` names the part that fills a slot."""
    for key, value in given.items():
        where = path if key == "part" and path else f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flattened(value, where)
        else:
            yield where, value


def _filled(current: Any, cls: type[Any], tree: Mapping[str, Any], known: Known, path: str = "") -> Any:
    """An object of the class with the values of `tree`; the others are those of `current`, or the defaults."""
    fields = _fields(cls)
    values = _carried(current, cls)
    for name, inner in tree.items():
        if name == "part" and path:
            continue
        where = _below(path, name)
        slot = slot_of(cls, name) if name in fields else None
        if slot is not None:
            there: Any = values.get(name, fields[name].default)
            values[name] = _part(there, slot.slot, inner, known, where)
        elif name in fields and issubclass(cls, Part):
            if not inner:
                raise UserError(f"{where} has no value", "give one, or leave it out")
            if [*inner] != ["part"]:
                raise UserError(f"{where} is a plain field, and {next(iter(inner))!r} stands below it")
            values[name] = cast(where, kind_of(cls, name), inner["part"])
        else:
            raise _unknown(cls, name, path, where, known)
    return cls(**values)


def _carried(current: Any, cls: type[Any]) -> dict[str, Any]:
    """What an object of the class has of `current`: everything, or what methods of two kinds have in common."""
    if type(current) is cls:
        return {name: getattr(current, name) for name in _fields(cls)}
    if issubclass(cls, Part):
        return {}
    common = [name for name in _fields(cls) if name in _fields(type(current)) and name != "mask"]
    return {name: getattr(current, name) for name in common}


def _part(current: Part, slot: str, tree: Mapping[str, Any], known: Known, path: str) -> Part:
    """The part that is to fill a slot: another part, or the one that is there with other values."""
    wanted, cls = tree.get("part"), type(current)
    if isinstance(wanted, Part):
        if wanted.slot != slot:
            raise UserError(f"{path} takes no {wanted.slot}", f"give one of {', '.join(known[slot])}")
        current, cls = wanted, type(wanted)
    elif wanted is not None:
        if str(wanted) not in known[slot]:
            raise UserError(f"there is no {path}={wanted}", nearest(str(wanted), known[slot]))
        cls = known[slot][str(wanted)]
    return _filled(current, cls, tree, known, path)


def _unknown(cls: type[Any], name: str, path: str, where: str, known: Known) -> UserError:
    """The error for a field that does not exist, with what may have been meant."""
    fields, slot = [*_fields(cls)], getattr(cls, "slot", None)
    if slot is None:
        return UserError(f"there is no {where!r}", nearest(name, known))
    owners = [f"{path}={other}" for other, part in known[slot].items() if name in _fields(part)]
    if owners or not fields:
        remedy = f"{' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "it has none"
        return UserError(f"{path}={cls.name} has no field {name!r}", remedy)
    return UserError(f"there is no {where!r}", nearest(where, [f"{path}.{field}" for field in fields]))


def _fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a user may set, those of the class itself in its order."""
    found = {f.name: f for f in dataclasses.fields(cls)}
    own = [name for name in inspect.get_annotations(cls) if name in found]
    return {name: found[name] for name in (*(n for n in found if n not in own), *own)}


def _below(path: str, name: str) -> str:
    """The path of a field of what stands at `path`."""
    return name if not path or OWNERS.get(name) == path else f"{path}.{name}"


def slot_names(cls: type[Any]) -> list[str]:
    """The fields that take parts."""
    return [name for name in _fields(cls) if slot_of(cls, name) is not None]


def text_of(value: Any) -> str:
    """A value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def slots(owner: Any, path: str = "") -> Iterator[tuple[str, Part]]:
    """Every part with its path, outer ones first."""
    for name in slot_names(type(owner)):
        part, where = getattr(owner, name), _below(path, name)
        yield where, part
        yield from slots(part, where)


def told(owner: Any, usual: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings to be typed to turn the part `usual` into `owner`; None is a part with its defaults."""
    for name, field in _fields(type(owner)).items():
        value, where = getattr(owner, name), _below(path, name)
        before: Any = field.default if usual is None else getattr(usual, name, None)
        if slot_of(type(owner), name) is None:
            if isinstance(owner, Part) and value != before:
                yield where, value
            continue
        if type(value) is not type(before):
            yield where, value.name
            before = None
        yield from told(value, before, where)


def plain_fields(cls: type[Part]) -> list[dataclasses.Field[Any]]:
    """The fields of a part that are no parts."""
    return [f for f in _fields(cls).values() if slot_of(cls, f.name) is None]
