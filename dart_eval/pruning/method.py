"""What a pruning method is: its parameters, and how it scores neurons. Nothing here knows a model or a task.

Shapes: L layers, B sequences, T tokens, F neurons of a layer, D model width.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dart_eval.allocation import ALLOCATIONS
from dart_eval.errors import UserError, nearest
from dart_eval.ffn import FFN
from dart_eval.pruning.drift import DriftConfig


@runtime_checkable
class Calibration(Protocol):
    """What a static method may look at before any prompt is seen."""

    @property
    def ffns(self) -> list[FFN]:
        """The model's FFNs, layer by layer."""
        ...

    def energy(self) -> list[Tensor]:
        """Per layer [F]: sum over the calibration text's tokens of h^2, fp32."""
        ...


@dataclass(frozen=True)
class Remask:
    """How masks are made anew after an alarm.

    Attributes:
        ring: R, how many recent FFN inputs are kept per layer and sequence.
        blend: weight of the prompt's scores against the recent ones, both per token; 0 replaces them.
    """

    ring: int = 24
    blend: float = 0.25


@dataclass(frozen=True)
class DepthRule:
    """How the `depth` allocation judges layers; the defaults are the paper's rule, False its ablations.

    Attributes:
        protect: early and late layers are spared, whatever their sensitivity.
        magnitude: sensitivity weighs the change of direction by its size; else the direction alone counts.
    """

    protect: bool = True
    magnitude: bool = True


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses: their fields are the parameters a user sets.

    Attributes:
        name: what a user types.
        summary: one line for `dart-eval ls methods`.
        prunes: False only for `dense`, which has no sparsity.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layer_allocation not in ALLOCATIONS:
            raise UserError(
                f"{self.name}: allocation {self.layer_allocation!r} is unknown",
                nearest(self.layer_allocation, ALLOCATIONS),
            )

    @property
    def layer_allocation(self) -> str:
        """How the sparsity is spread over layers: `uniform` or `depth`."""
        return getattr(self, "allocation", "uniform")

    def params(self) -> dict[str, Any]:
        """Every parameter with its value, as recorded in results."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StaticMethod(Method):
    """One mask for everything, made before any prompt is seen."""

    @abstractmethod
    def static_scores(self, calibration: Calibration) -> list[Tensor]:
        """Per layer [F]; higher is kept. Only the order within a layer counts."""


@dataclass(frozen=True)
class PromptMethod(Method):
    """A mask per sequence, from the tokens of its context.

    The statistic must be a sum over tokens, so that chunks and padding cannot change it.
    """

    @abstractmethod
    def energy(self, h: Tensor, valid: Tensor) -> Tensor:
        """Score of the given tokens, summed over them.

        Args:
            h: [B, T, F] fp32, the input of the down projection.
            valid: [B, T] fp32, 1 for tokens that count and 0 for padding.

        Returns:
            [B, F] fp32, non-negative; higher is kept.
        """

    @property
    def depth_rule(self) -> DepthRule:
        """How layers are judged (used only with the allocation `depth`)."""
        return DepthRule()

    @property
    def drift(self) -> DriftConfig | None:
        """The detector's settings, or None for a method that never renews its mask."""
        return None

    @property
    def remask(self) -> Remask:
        """How a mask is made anew (used only with `drift`)."""
        return Remask()


M = TypeVar("M", bound=Method)


def build(cls: type[M], params: Mapping[str, Any]) -> M:
    """A method from parameters that may be strings, as typed: `{"allocation": "uniform", "window": "8"}`.

    Raises:
        UserError: unknown parameter, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in params.items():
        if key not in known:
            hint = nearest(key, known) if known else "it has none"
            raise UserError(f"method {cls.name} has no parameter {key!r}", hint)
        values[key] = _cast(cls.name, key, value, known[key])
    return cls(**values)


def _cast(method: str, key: str, value: Any, kind: type) -> Any:
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[str(value).lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"{method}:{key}={value} is not {wanted}") from None
