"""The thresholds of a check: least shares of the baseline's and of dense's quality, and the level of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import short_repr
from dart_eval.util.yamls import read_mapping

KEYS = ("recovery", "of_dense", "alpha", "tasks")
ONLY_KNOWN = ConfigDict(extra="forbid")
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True, config=ONLY_KNOWN)
class Limits:
    """Least shares of the baseline's quality (`recovery`) and of dense's (`of_dense`; None: any)."""

    recovery: Share = 0.98
    of_dense: Share | None = None


@dataclass(frozen=True, config=ONLY_KNOWN)
class Thresholds:
    """The `limits`, other limits for some `tasks`, and the level `alpha` of the tests over all rows."""

    limits: Limits = Limits()
    alpha: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    tasks: dict[str, Limits] = Field(default_factory=dict)

    def limits_of(self, task: str) -> Limits:
        return self.tasks.get(task, self.limits)


def thresholds_from(file: Path | None) -> Thresholds:
    """Read the thresholds of a YAML file; the defaults without one."""
    limits = {} if file is None else read_mapping(file, "thresholds", "recovery: 0.98", empty=True)
    data = {name: limits.pop(name) for name in ("alpha", "tasks") if name in limits}
    if isinstance(tasks := data.get("tasks"), dict):  # a task's limits replace the common ones
        data["tasks"] = {task: {**limits, **own} if isinstance(own, dict) else own for task, own in tasks.items()}
    try:
        return TypeAdapter(Thresholds).validate_python({"limits": limits, **data})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        *places, name = map(str, first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"unknown key {name!r} in {file}", nearest(name, KEYS)) from None
        where = " ".join([*places, name]).removeprefix("limits ")
        said = f"{where} {short_repr(first['input'])} in {file}: {first['msg'].lower()}"
        raise UserError(said, "for example `recovery: 0.98`") from None
