"""Compensation: what replaces the output of pruned neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Compensation(Part):
    """Base of all compensations.

    Attributes:
        adds: whether it adds a constant per sequence and layer to the FFN's output: the observed mean of the neurons
            outside the mask, multiplied by down.
        fills: whether each neuron that a token leaves out takes its observed mean. A kernel would add a constant per
            sequence and layer, and multiply the taken columns of down by the difference from the mean.
    """

    slot = "compensation"
    adds: ClassVar[bool] = False
    fills: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Nothing(Compensation):
    """Pruned neurons count as 0."""

    name = "none"
    summary = "adds nothing for the neurons that are left out"


@dataclass(frozen=True, kw_only=True)
class MeanOutput(Compensation):
    """A constant is added: what the neurons outside the mask added on average, W_down[:, pruned] mean(h)[pruned].

    Over a calibration text it is the bias of FLAP (arXiv 2312.11983). If the mask is fixed too, it is computed once,
    before any prompt.
    """

    name = "mean"
    summary = "adds a constant: the mean output of the neurons outside the mask over the context's tokens"
    adds = True
    fits_norms = False
    fits_repeats = False
    flops_per_neuron = 2  # a factor and a sum
    over: Literal["context", "calibration"] = option(
        "context", "take means over the tokens of the context, or of the calibration text"
    )

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.over == "context"

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.over == "calibration"

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        return (weight[:, None] @ h).squeeze(1)

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.layers * shape.width


@dataclass(frozen=True, kw_only=True)
class MeanHidden(MeanOutput):
    """Each neuron that a token leaves out, in the mask or not, takes its mean over the context's tokens."""

    name = "mean-token"
    summary = "replaces each neuron that a token leaves out by its mean over the context's tokens"
    adds = False
    fills = True
    fits_norms = True
    fits_experts = False

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.layers * shape.width + mask


COMPENSATIONS = (Nothing, MeanOutput, MeanHidden)
