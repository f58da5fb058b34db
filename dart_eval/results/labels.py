"""Labels of cells: the method as typed, and the settings that distinguish cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from dart_eval.results.inputs import FIELDS, HASH_DIGITS, NAMED, UNSAID, matters
from dart_eval.util.bits import bits_text
from dart_eval.util.text import Json

T = TypeVar("T")
K = TypeVar("K")
CODE = ("code", "method_code")  # which differ between versions, and between methods
LONGEST = 40  # characters of a setting's value in a label


class Labelled(Protocol):
    """A record, or a cell of a baseline."""

    @property
    def key(self) -> str: ...
    @property
    def inputs(self) -> Json: ...
    @property
    def settings(self) -> dict[str, object]: ...


def specs(records: Iterable[Labelled]) -> dict[str, str]:
    """Return key -> the method as typed, with the differing parameters if that is ambiguous."""
    found: dict[str, str] = {}
    for some in grouped(records, lambda r: r.inputs["method"]).values():
        settings = grouped(some, _params)
        # Of several spellings of one setting the longest: one version's default may be another's parameter.
        typed = {p: max((str(r.settings.get("method") or r.inputs["method"]) for r in rs), key=lambda t: (len(t), t))
                 for p, rs in settings.items()}  # fmt: skip
        spelled = exact(some, every=True)
        unclear = len(set(typed.values())) < len(typed)
        found |= {r.key: spelled[r.key] if unclear else typed[p] for p, rs in settings.items() for r in rs}
    return found


def exact(records: Iterable[Labelled], every: bool = False) -> dict[str, str]:
    """Return key -> the method with the fewest parameters that distinguish its cell, as `compare` takes it.

    Args:
        records: the cells to distinguish.
        every: whether to give all parameters in which settings of one method differ.
    """
    found = {}
    for method, some in grouped(records, lambda r: r.inputs["method"]).items():
        settings = {_params(r): {**UNSAID, **r.inputs["params"]} for r in some}
        for r in some:
            own = settings[_params(r)]
            others = [v for p, v in settings.items() if p != _params(r)]
            differ = sorted(k for k in own if any(v.get(k) != own[k] for v in others))
            apart = [k for k in differ if all(v.get(k) != own[k] for v in others)]
            least = sorted(apart, key=lambda k: (k.count("."), k))[:1] or differ
            found[r.key] = ":".join([method, *(f"{k}={_plain(own[k])}" for k in (differ if every else least))])
    return found


def labels(records: Sequence[Labelled]) -> dict[str, str]:
    """Return a label per key: the method, the bits of its weights, and the settings in which cells of a task differ."""
    groups = list(grouped(records, lambda r: r.inputs["task"]).values())
    apart = [s for s in NAMED if any(len(values_of(s, group)) > 1 for group in groups)]
    models = {(r.inputs["model"]["name"], json.dumps(r.inputs["model"], sort_keys=True)) for r in records}
    methods, found = specs(records), {}
    for r in records:
        model = r.inputs["model"]
        which = [f"model={str(model.get('weights') or model.get('revision'))[:8]}"]
        details = which if len(models) > len({name for name, _ in models}) else []
        details += [_setting_text(s, r) for s in apart if s not in CODE and matters(s, r.inputs)
                 and not (FIELDS[s].any and r.inputs.get(s) is None)]  # fmt: skip
        bits = f" on {bits_text(r.inputs['ffn_bits'])}" if r.inputs.get("ffn_bits") else ""
        found[r.key] = methods[r.key] + bits, details
    for rs in grouped(records, lambda r: (found[r.key][0], *found[r.key][1])).values():
        # Only the code may distinguish two cells of one place.
        several = len(rs) > len({_place(r) for r in rs})
        for name in [name for name in CODE if several and len(values_of(name, rs)) > 1]:
            for r in rs:
                found[r.key][1].append(_setting_text(name, r))
    return {key: f"{name} ({' '.join(details)})" if details else name for key, (name, details) in found.items()}


def values_of(setting: str, cells: Iterable[Labelled]) -> list[str]:
    """Return the values of a setting in these cells, as text, without those that match any."""
    found = {json.dumps(c.inputs.get(setting)) for c in cells if matters(setting, c.inputs)}
    return sorted(found - {"null"} if setting in FIELDS and FIELDS[setting].any else found)


def _setting_text(setting: str, record: Labelled) -> str:
    text = _plain(record.inputs.get(setting))
    if FIELDS[setting].hashed:
        return f"{setting}={text[:HASH_DIGITS]}"
    if len(text) > LONGEST:  # what sets two texts apart may stand in what is cut off
        text = f"{text[:LONGEST]}~{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:4]}"
    return f"{setting}={text}"


def _params(record: Labelled) -> str:
    return json.dumps({**UNSAID, **record.inputs["params"]}, sort_keys=True)


def _place(record: Labelled) -> tuple[object, ...]:
    inputs = record.inputs
    return (*(inputs[name] for name in ("task", "sparsity", "scope")), inputs["model"]["name"], inputs.get("ffn_bits"))


def grouped(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by their key, in the order of its first one."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


def _plain(value: object) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)
