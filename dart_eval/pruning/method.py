"""What a pruning method is: its parameters, and how it scores neurons. Nothing here knows a model or a task.

Shapes: L layers, B sequences, T tokens, F neurons of a layer, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dart_eval.allocation import ALLOCATIONS, TABLE, read_table
from dart_eval.errors import UserError, nearest
from dart_eval.ffn import FFN
from dart_eval.files import check_name
from dart_eval.pruning.drift import DriftConfig
from dart_eval.pruning.scores import Projection


@runtime_checkable
class Calibration(Protocol):
    """What a method may look at before any prompt is seen."""

    @property
    def ffns(self) -> list[FFN]:
        """The model's FFNs, layer by layer."""
        ...

    def energy(self) -> list[Tensor]:
        """Per layer [F]: sum over the calibration text's tokens of h^2, fp32."""
        ...

    def projection(self) -> list[Projection]:
        """Per layer, what its neurons write to the vocabulary."""
        ...


@dataclass(frozen=True)
class Renewal:
    """How and when masks are made anew. Layer ratios stay as the prompt set them.

    Attributes:
        ring: R, how many recent FFN inputs are kept per layer and sequence.
        blend: weight of the old scores against the recent ones after an alarm, both per token; 0 replaces them.
        every: also renew after so many tokens, alarm or not; 0 never.
        every_blend: weight of the old scores in those steady renewals.
        running: the old scores are those of the mask in force (an exponential average); else the prompt's.
        dense_tokens: M > 0 takes the recent scores from the M tokens after an alarm, which run dense, instead of
            from the ring.
        on_alarm: an alarm renews the mask; else the detector only watches.
        move_reference: the detector's reference moves to the recent windows with each renewal after an alarm.
    """

    ring: int = 24
    blend: float = 0.25
    every: int = 0
    every_blend: float = 0.8
    running: bool = False
    dense_tokens: int = 0
    on_alarm: bool = True
    move_reference: bool = True


@dataclass(frozen=True)
class DepthRule:
    """How the `depth` allocation judges layers; the defaults are the paper's rule, the others its ablations.

    Attributes:
        protect: early and late layers are spared, whatever their sensitivity.
        magnitude: sensitivity weighs the change of direction by its size; else the direction alone counts.
        residual: z is the stream after the FFN; else what the FFN adds.
    """

    protect: bool = True
    magnitude: bool = True
    residual: bool = False


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
        if self.layer_allocation not in ALLOCATIONS and not self.layer_allocation.startswith(TABLE):
            known = (*ALLOCATIONS, TABLE)
            raise UserError(
                f"{self.name}: allocation {self.layer_allocation!r} is unknown",
                f"{nearest(self.layer_allocation, known)} ({TABLE}FILE for a saved one)",
            )
        for file in self.files():
            check_name(file, f"{self.name}: allocation table")
            if not Path(file).is_file():
                raise UserError(
                    f"{self.name}: allocation table {file} is not a file",
                    "write one with `dart-eval trace --save-allocation FILE`",
                )
        _ = self.table  # read now: a bad file is no surprise for later

    @property
    def layer_allocation(self) -> str:
        """How the sparsity is spread over layers: `uniform`, `depth`, or `table:FILE`."""
        return getattr(self, "allocation", "uniform")

    def files(self) -> list[str]:
        """Files that the method reads: what is in them can change its numbers."""
        allocation = self.layer_allocation
        return [allocation.removeprefix(TABLE)] if allocation.startswith(TABLE) else []

    @functools.cached_property
    def table(self) -> list[float] | None:
        """[L] keep ratios of the saved allocation, or None where the allocation is none."""
        return read_table(self.files()[0]) if self.files() else None

    @property
    def token_chooses(self) -> bool:
        """Whether each token chooses neurons of its own: a near-tie may fall either way with the shape of a batch."""
        return False

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

    The statistic must be a weighted sum over tokens, so that chunks and padding cannot change it.

    Attributes:
        looks_ahead: the mask is made from the tokens that it will be used on (an oracle: no method to use, but a mark).
    """

    looks_ahead: ClassVar[bool] = False

    @abstractmethod
    def energy(self, h: Tensor, weight: Tensor) -> Tensor:
        """Score of the given tokens, summed over them.

        Args:
            h: [B, T, F] fp32, the input of the down projection.
            weight: [B, T] fp32, what a token counts: usually 1, and 0 for padding.

        Returns:
            [B, F] fp32, non-negative; higher is kept.
        """

    def neuron_weights(self, calibration: Calibration) -> list[Tensor] | None:
        """Per layer [F] fp32, a factor on a neuron's energy that no token changes; None for none."""
        return None

    @property
    def token_decay(self) -> float | None:
        """Of an exponential average over the context's tokens; None weighs them alike."""
        return None

    @property
    def skips_first(self) -> bool:
        """The first token (a sink with outlying activations) is left out of the scores."""
        return False

    @property
    def depth_rule(self) -> DepthRule:
        """How layers are judged (used only with the allocation `depth`)."""
        return DepthRule()

    @property
    def drift(self) -> DriftConfig | None:
        """The detector's settings, or None for a method without one."""
        return None

    @property
    def renewal(self) -> Renewal:
        """How a mask is made anew (used only with `drift`, or where `every` is set)."""
        return Renewal()

    @property
    def stages(self) -> float:
        """Neurons of the mask as a multiple of the weights read; above 1 every token picks some of them (see
        `allocation.stage_counts`)."""
        return 1.0

    @property
    def down(self) -> float:
        """Of the neurons that a token picks, the share that it writes: those with the largest |h|."""
        return 1.0

    @property
    def compensate(self) -> bool:
        """What the neurons outside the mask add on average is added as a constant."""
        return False

    @property
    def token_chooses(self) -> bool:
        return self.stages > 1

    @property
    def needs_ring(self) -> bool:
        """Whether recent FFN inputs must be kept."""
        alarms = self.drift is not None and self.renewal.on_alarm and not self.renewal.dense_tokens
        return alarms or self.renewal.every > 0


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
