"""Labels of cells: the method as typed, and the settings that distinguish cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from dart_eval.results.inputs import FIELDS, HASH_DIGITS, LEGACY_DEFAULTS, NAMED, matters
from dart_eval.util.bits import bits_text

if TYPE_CHECKING:
    from dart_eval.results.cells import Cell
    from dart_eval.results.record import Record

Labelled: TypeAlias = "Record | Cell"
T = TypeVar("T")
K = TypeVar("K")
CODE = ("code", "method_code")  # which differ between versions, and between methods
LONGEST = 40  # characters of a setting's value in a label
PLACE = ("task", "sparsity", "scope", "ffn_bits")  # with the model: of a row of tables


def specs(records: Iterable[Labelled]) -> dict[str, str]:
    """Return key -> the method as typed, with the differing parameters if that is ambiguous."""
    found: dict[str, str] = {}
    for cells in grouped(records, lambda r: r.inputs["method"]).values():
        spellings = {r.key: str(r.settings.get("method") or r.inputs["method"]) for r in cells}
        # Of several spellings of one setting the longest: one version's default may be another's parameter.
        typed = {
            params: max((spellings[r.key] for r in alike), key=lambda text: (len(text), text))
            for params, alike in grouped(cells, _params).items()
        }
        clear = len(set(typed.values())) == len(typed)
        found |= {r.key: typed[_params(r)] for r in cells} if clear else exact(cells, every=True)
    return found


def exact(records: Iterable[Labelled], every: bool = False) -> dict[str, str]:
    """Return key -> the method with the fewest parameters that distinguish its cell, as `compare` takes it.

    Args:
        records: the cells to distinguish.
        every: whether to give all parameters in which settings of one method differ.
    """
    found = {}
    for method, cells in grouped(records, lambda r: r.inputs["method"]).items():
        settings = {_params(r): LEGACY_DEFAULTS | r.inputs["params"] for r in cells}
        for r in cells:
            own = settings[_params(r)]
            others = [params for text, params in settings.items() if text != _params(r)]
            differ = sorted(k for k in own if any(params.get(k) != own[k] for params in others))
            apart = [k for k in differ if all(params.get(k) != own[k] for params in others)]
            least = sorted(apart, key=lambda k: (k.count("."), k))[:1] or differ
            found[r.key] = ":".join([method, *(f"{k}={_plain(own[k])}" for k in (differ if every else least))])
    return found


def labels(records: Sequence[Labelled]) -> dict[str, str]:
    """Return a label per key: the method, the bits of its weights, and the settings in which cells of a task differ."""
    groups = list(grouped(records, lambda r: r.inputs["task"]).values())
    apart = [s for s in NAMED if s not in CODE and any(len(values_of(s, group)) > 1 for group in groups)]
    models = {(r.inputs["model"]["name"], json.dumps(r.inputs["model"], sort_keys=True)) for r in records}
    same_name = len(models) > len({name for name, _ in models})
    typed, names, details = specs(records), dict[str, str](), dict[str, list[str]]()
    for r in records:
        model = r.inputs["model"]
        details[r.key] = [f"model={str(model.get('weights') or model.get('revision'))[:8]}"] if same_name else []
        for name in apart:
            if matters(name, r.inputs) and not (FIELDS[name].any and r.inputs.get(name) is None):
                details[r.key].append(_setting_text(name, r))
        bits = f" on {bits_text(r.inputs['ffn_bits'])}" if r.inputs.get("ffn_bits") else ""
        names[r.key] = typed[r.key] + bits
    for alike in grouped(records, lambda r: (names[r.key], *details[r.key])).values():
        # Only the code may distinguish two cells of one place.
        places = {json.dumps([r.inputs.get(name) for name in PLACE] + [r.inputs["model"]["name"]]) for r in alike}
        for name in CODE:
            if len(alike) > len(places) and len(values_of(name, alike)) > 1:
                for r in alike:
                    details[r.key].append(_setting_text(name, r))
    return {key: f"{name} ({' '.join(details[key])})" if details[key] else name for key, name in names.items()}


def values_of(setting: str, cells: Iterable[Labelled]) -> list[str]:
    """Return the values of a setting in these cells, as text, without those that match any."""
    found = {json.dumps(c.inputs.get(setting)) for c in cells if matters(setting, c.inputs)}
    return sorted(found - {"null"} if setting in FIELDS and FIELDS[setting].any else found)


def grouped(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by their key, in the order of its first one."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


def _params(record: Labelled) -> str:
    return json.dumps(LEGACY_DEFAULTS | record.inputs["params"], sort_keys=True)


def _setting_text(setting: str, record: Labelled) -> str:
    text = _plain(record.inputs.get(setting))
    if FIELDS[setting].hashed:
        text = text[:HASH_DIGITS]
    elif len(text) > LONGEST:  # what sets two texts apart may stand in what is cut off
        text = f"{text[:LONGEST]}~{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:4]}"
    return f"{setting}={text}"


def _plain(value: object) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)
