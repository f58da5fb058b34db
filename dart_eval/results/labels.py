"""What cells are called: the method as it was typed, and whatever else tells two cells apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from dart_eval.bits import said
from dart_eval.results.inputs import FIELDS, NAMED, UNSAID, matters


class Named(Protocol):
    """What can be named: a record, or a cell of a baseline."""

    @property
    def key(self) -> str: ...
    @property
    def inputs(self) -> dict[str, Any]: ...
    @property
    def settings(self) -> dict[str, Any]: ...


def specs(records: Iterable[Named]) -> dict[str, str]:
    """Key -> the method as a user types it: its name and the parameters that are not its defaults.

    Where that does not tell two settings apart (another version had other defaults, or an old record does not say what
    was typed), also the parameters in which they differ.
    """
    variants: dict[str, dict[str, dict[str, Any]]] = {}  # method -> its settings, as text and as they are
    typed: dict[tuple[str, str], str] = {}
    places, records = {}, list(records)
    unsaid = _unsaid(records)
    for r in records:
        filled = {**unsaid[r.inputs["method"]], **r.inputs["params"]}
        method, params = r.inputs["method"], json.dumps(filled, sort_keys=True)
        places[r.key] = method, params
        variants.setdefault(method, {})[params] = filled
        said = r.settings.get("method")
        if said:  # of several the longest: what one version must be told is another's default
            typed[method, params] = max(typed.get((method, params), ""), said, key=lambda text: (len(text), text))
    found: dict[tuple[str, str], str] = {}
    for method, settings in variants.items():
        own = {params: typed.get((method, params), method) for params in settings}
        if len(set(own.values())) < len(own):
            named = {part.partition("=")[0] for text in own.values() for part in text.split(":")[1:]}
            every = list(settings.values())
            names = sorted({
                k for v in every for k in v if k in named or any(k not in w or v[k] != w[k] for w in every)
            })  # fmt: skip
            for params, setting in settings.items():
                own[params] = ":".join([method, *(f"{k}={_plain(setting.get(k))}" for k in names)])
        found.update({(method, params): text for params, text in own.items()})
    return {key: found[place] for key, place in places.items()}


def exact(records: Iterable[Named]) -> dict[str, str]:
    """Key -> the method with as few parameters as tell its cell from others of its name: what `compare` takes."""
    settings: dict[str, dict[str, dict[str, Any]]] = {}  # method -> its settings, as text and as they are
    places = {}
    for r in records:
        filled = {**UNSAID, **r.inputs["params"]}
        places[r.key] = r.inputs["method"], json.dumps(filled, sort_keys=True)
        settings.setdefault(r.inputs["method"], {})[places[r.key][1]] = filled
    found = {}
    for key, (method, text) in places.items():
        own, others = settings[method][text], [v for t, v in settings[method].items() if t != text]
        apart = [k for k in own if others and all(v.get(k) != own[k] for v in others)]
        some = [k for k in own if any(v.get(k) != own[k] for v in others)]
        chosen = sorted(apart, key=lambda k: (k.count("."), k))[:1] or some
        found[key] = ":".join([method, *(f"{k}={_plain(own[k])}" for k in chosen)])
    return found


def _unsaid(records: Iterable[Named]) -> dict[str, dict[str, Any]]:
    """Per method the fields that some of its cells tell and others, of an older version, do as they always did."""
    told: dict[str, set[str]] = {}
    for r in records:
        told.setdefault(r.inputs["method"], set()).update(r.inputs["params"])
    return {method: {k: v for k, v in UNSAID.items() if k in fields} for method, fields in told.items()}


def labels(records: Sequence[Named], by_task: bool = False) -> dict[str, str]:
    """A label per cell key: the method as it was typed, and whatever else tells two cells of the table apart.

    Settings of the run and the model's hash stand there where the records differ in them; the versions of the code and
    of packages only where nothing else tells two cells apart.

    by_task: settings only where cells of one task differ in them (each task may have a limit of its own).
    """
    groups = _grouped(records, lambda r: r.inputs["task"]) if by_task else [records]
    apart = {s for group in groups for s in NAMED if len(values(s, group)) > 1}
    models = {(r.inputs["model"]["name"], json.dumps(r.inputs["model"], sort_keys=True)) for r in records}
    same_name = len(models) > len({name for name, _ in models})  # other weights or another revision
    methods, found, settings = specs(records), {}, {}
    for r in records:
        settings[r.key] = [_said(s, r) for s in NAMED if s in apart and s != "code" and _says(s, r)]
        if same_name:
            which = r.inputs["model"].get("weights") or r.inputs["model"].get("revision")
            settings[r.key].insert(0, f"model={str(which)[:8]}")
        bits = r.inputs.get("ffn_bits")
        found[r.key] = methods[r.key] + (f" on {said(bits)}" if bits else "")
    for group in _alike(records, {key: (found[key], *settings[key]) for key in found}):
        packages, code = _moved_packages(group), len(values("code", group)) > 1
        for r in group:
            settings[r.key] += [_said("code", r)] * code
            settings[r.key] += [f"{p}={(r.inputs.get('versions') or {}).get(p, 'none')}"[:40] for p in packages]
    return {key: f"{name} ({' '.join(settings[key])})" if settings[key] else name for key, name in found.items()}


def _says(setting: str, record: Named) -> bool:
    return matters(setting, record.inputs) and (not FIELDS[setting].any or record.inputs.get(setting) is not None)


def _said(setting: str, record: Named) -> str:
    return f"{setting}={_plain(record.inputs.get(setting))[: 8 if FIELDS[setting].hashed else 40]}"


def _alike(records: Sequence[Named], names: Mapping[str, Any]) -> list[list[Named]]:
    """Cells of one name, where some of them stand at the same place of a table."""
    return [g for g in _grouped(records, lambda r: names[r.key]) if len(g) > len({_place(r) for r in g})]


def _place(record: Named) -> tuple[Any, ...]:
    inputs = record.inputs
    return (*(inputs[name] for name in ("task", "sparsity", "scope")), inputs["model"]["name"], inputs.get("ffn_bits"))


def values(setting: str, cells: Iterable[Named]) -> list[str]:
    """The values that a setting has in these cells, as text; without those that go with any."""
    found = {json.dumps(c.inputs.get(setting)) for c in cells if matters(setting, c.inputs)}
    return sorted(found - {"null"} if setting in FIELDS and FIELDS[setting].any else found)


def _grouped(records: Sequence[Named], by: Callable[[Named], Any]) -> list[list[Named]]:
    groups: dict[Any, list[Named]] = {}
    for r in records:
        groups.setdefault(by(r), []).append(r)
    return list(groups.values())


def _moved_packages(records: Sequence[Named]) -> list[str]:
    """As few packages as tell the records' versions apart."""
    versions = [r.inputs.get("versions") or {} for r in records]
    moved = [n for n in sorted({n for v in versions for n in v}) if len({v.get(n) for v in versions}) > 1]
    moved.sort(key=lambda n: -len({v.get(n) for v in versions}))
    chosen: list[str] = []

    def kinds(names: Sequence[str]) -> int:
        return len({tuple(v.get(n) for n in names) for v in versions})

    for name in moved:
        if kinds([*chosen, name]) > kinds(chosen):
            chosen.append(name)
    return chosen


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)
