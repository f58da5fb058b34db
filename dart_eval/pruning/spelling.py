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
from dart_eval.util.retired import retired

# Slots of parts, addressed by their names alone.
OWNERS = {"score": "mask", "draw": "mask", "remask": "mask"}

Method = TypeVar("Method", bound=Any)
Tree = dict[str, Any]  # slot -> {"part": its name, field or inner slot -> the same}
Catalog = Mapping[str, Mapping[str, type[Part]]]  # slot -> name -> part


def changed(
    base: Method,
    settings: Mapping[str, object],
    catalog: Catalog,
    kind: Callable[[Method, list[type[Part]]], type[Method]],
) -> Method:
    """Return the method `base` with other parts and values.

    Args:
        settings: values by path. A slot takes the name of a part, a `Part`, or a mapping with its fields (and its
            name under `part`); a field takes its value.
        kind: returns the kind of a method with parts of these classes in its slots.

    Raises:
        UserError: an unknown path or part, or a bad value.
    """
    tree: dict[str, object] = {}
    for path, value in settings.items():
        steps = str(path).split(".")
        if steps[0] in OWNERS and steps[0] in catalog:
            steps = [OWNERS[steps[0]], *steps]
        if len(steps) > 1 and steps[-1] == "part":
            steps = steps[:-1]
        _merge(tree, steps, value, str(path))
    with naming(f"{base.name}: "):
        return dataclasses.replace(
            _filled(base, kind(base, _parts(tree, catalog)), tree, catalog), base=base.base or base
        )


def _parts(tree: Tree, catalog: Catalog) -> list[type[Part]]:
    """Return the classes of the new parts in the method's own slots; unknown names are skipped."""
    classes = []
    for slot, inner in tree.items():
        wanted = inner.get("part")
        cls = type(wanted) if isinstance(wanted, Part) else catalog.get(slot, {}).get(str(wanted))
        classes += [cls] if cls is not None else []
    return classes


def _merge(tree: Tree, steps: list[str], value: object, path: str) -> None:
    """Merge a value into nested mappings. The part of a slot stands under `part`."""
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


def flattened(settings: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the paths and values of nested mappings, in which `part` names the part of a slot."""
    for key, value in settings.items():
        where = path if key == "part" and path else f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flattened(value, where)
        else:
            yield where, value


def _filled(current: object, cls: type[object], tree: Tree, catalog: Catalog, path: str = "") -> Any:
    """Return an object of the class with the values of `tree`, then those of `current`, then the defaults."""
    fields = _fields(cls)
    values = _carried(current, cls)
    for name, inner in tree.items():
        if name == "part" and path:
            continue
        where = _below(path, name)
        slot = slot_of(cls, name) if name in fields else None
        if slot is not None:
            old: Any = values.get(name, fields[name].default)
            values[name] = _part(old, slot.slot, inner, catalog, where)
        elif name in fields and issubclass(cls, Part):
            if not inner:
                raise UserError(f"{where} has no value", "give one, or leave it out")
            if [*inner] != ["part"]:
                raise UserError(f"{where} is a plain field, and {next(iter(inner))!r} stands below it")
            values[name] = cast(where, kind_of(cls, name), inner["part"])
        else:
            raise _unknown(cls, name, path, where, catalog)
    return cls(**values)


def _carried(current: object, cls: type[object]) -> dict[str, object]:
    """Return the values that carry over from `current`: all, or the common fields of two kinds of methods."""
    if type(current) is cls:
        return {name: getattr(current, name) for name in _fields(cls)}
    if issubclass(cls, Part):
        return {}
    common = [name for name in _fields(cls) if name in _fields(type(current)) and name != "mask"]
    return {name: getattr(current, name) for name in common}


def _part(current: Part, slot: str, tree: Tree, catalog: Catalog, path: str) -> Part:
    """Return the new part of a slot: another part, or the current one with other values."""
    wanted, cls = tree.get("part"), type(current)
    if isinstance(wanted, Part):
        if wanted.slot != slot:
            raise UserError(f"{path} takes no {wanted.slot}", f"give one of {', '.join(catalog[slot])}")
        current, cls = wanted, type(wanted)
    elif wanted is not None:
        if str(wanted) not in catalog[slot]:
            raise retired("part", str(wanted)) or UserError(
                f"there is no {path}={wanted}", nearest(str(wanted), catalog[slot])
            )
        cls = catalog[slot][str(wanted)]
    return _filled(current, cls, tree, catalog, path)


def _unknown(cls: type[Any], name: str, path: str, where: str, catalog: Catalog) -> UserError:
    """Return the error for an unknown field, with suggestions."""
    fields, slot = [*_fields(cls)], getattr(cls, "slot", None)
    if slot is None and (gone := retired("part", name)):
        return gone
    if slot is None and name in catalog:
        return UserError(f"this method has no {name}", "see its parts with `dart-eval ls methods`")
    if slot is None:
        return UserError(f"there is no {where!r}", nearest(name, catalog))
    owners = [f"{path}={other}" for other, part in catalog[slot].items() if name in _fields(part)]
    if owners or not fields:
        remedy = f"{' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "it has none"
        return UserError(f"{path}={cls.name} has no field {name!r}", remedy)
    return UserError(f"there is no {where!r}", nearest(where, [f"{path}.{field}" for field in fields]))


def _fields(cls: type) -> dict[str, dataclasses.Field[object]]:
    """Return the fields that a user may set: inherited ones first, then the class's own in their order."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    own = [name for name in inspect.get_annotations(cls) if name in fields]
    return {name: fields[name] for name in (*(n for n in fields if n not in own), *own)}


def _below(path: str, name: str) -> str:
    """Return the path of a field of the part at `path`."""
    return name if not path or OWNERS.get(name) == path else f"{path}.{name}"


def slot_names(cls: type[object]) -> list[str]:
    """Return the names of the fields that take parts."""
    return [name for name in _fields(cls) if slot_of(cls, name) is not None]


def text_of(value: object) -> str:
    """Spell a value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def slots(owner: object, path: str = "") -> Iterator[tuple[str, Part]]:
    """Yield every part with its path, outer ones first."""
    for name in slot_names(type(owner)):
        part, where = getattr(owner, name), _below(path, name)
        yield where, part
        yield from slots(part, where)


def changed_settings(owner: object, base: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings that turn the part `base` into `owner`. base: None for a part with its defaults."""
    for name, field in _fields(type(owner)).items():
        value, where = getattr(owner, name), _below(path, name)
        before: object = field.default if base is None else getattr(base, name, None)
        if slot_of(type(owner), name) is None:
            if isinstance(owner, Part) and value != before:
                yield where, value
            continue
        if type(value) is not type(before):
            yield where, value.name
            before = None
        yield from changed_settings(value, before, where)


def plain_fields(cls: type[Part]) -> list[dataclasses.Field[object]]:
    """Return the fields of a part that take plain values."""
    return [f for f in _fields(cls).values() if slot_of(cls, f.name) is None]
