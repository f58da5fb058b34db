"""The thresholds of a check: least shares of the baseline's and of dense's quality, and the level of the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json
from dart_eval.util.yamls import read_mapping


@dataclass(frozen=True)
class Limits:
    """Least shares of the baseline's quality (`recovery`) and of dense's (`of_dense`; None: any)."""

    recovery: float = 0.98
    of_dense: float | None = None


@dataclass(frozen=True)
class Thresholds:
    """The `limits`, other limits for some `tasks`, and the level `alpha` of the tests over all rows."""

    limits: Limits = Limits()
    alpha: float = 0.05
    tasks: dict[str, Limits] = field(default_factory=dict)

    def limits_of(self, task: str) -> Limits:
        return self.tasks.get(task, self.limits)


def thresholds_from(file: Path | None) -> Thresholds:
    """Read the thresholds of a YAML file; the defaults without one."""
    if file is None:
        return Thresholds()
    data = read_mapping(file, "thresholds", "recovery: 0.98", empty=True)
    data = _mapping(data, ("recovery", "of_dense", "alpha", "tasks"), str(file))
    tasks = data.pop("tasks", None)
    alpha = data.pop("alpha", Thresholds.alpha)
    if not _is_number(alpha) or not 0 < alpha < 1:
        raise UserError(f"alpha {alpha!r} in {file} must lie between 0 and 1", "for example 0.05")
    limits = _limits(Limits(), data, str(file))
    return Thresholds(limits, float(alpha), {
        task: _limits(limits, _mapping(own, ("recovery", "of_dense"), f"{file} for {task}"), f"{file} for {task}")
        for task, own in _mapping({} if tasks is None else tasks, None, f"{file} under tasks").items()
    })  # fmt: skip


def _mapping(data: object, keys: Sequence[str] | None, where: str) -> Json:
    if not isinstance(data, dict):
        raise UserError(f"{where} must contain keys and values, not {str(data)[:60]!r}", "for example `recovery: 0.98`")
    for key in data:
        if not isinstance(key, str):
            raise UserError(f"key {key!r} in {where} is no text", "put it in quotes if it is a name")
        if keys is not None and key not in keys:
            raise UserError(f"unknown key {key!r} in {where}", nearest(key, keys))
    return dict(data)


def _limits(limits: Limits, data: Json, where: str) -> Limits:
    for name, limit in data.items():
        if (limit is not None or name == "recovery") and not (_is_number(limit) and 0 < limit <= 1):
            raise UserError(
                f"{name} {limit!r} in {where} must lie above 0 and at most at 1", "0.98 allows a loss of 2 %"
            )
    return dataclasses.replace(limits, **data)


def _is_number(item: object) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)
