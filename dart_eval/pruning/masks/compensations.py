"""Compensation: what replaces the output of pruned neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.part import Part

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Compensation(Part):
    """Base of all compensations.

    Attributes:
        adds: whether it adds a constant to each FFN's output.
    """

    slot = "compensation"
    adds: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Nothing(Compensation):
    """Pruned neurons count as 0."""

    name = "none"
    summary = "adds nothing for the neurons that are left out"


@dataclass(frozen=True, kw_only=True)
class MeanOutput(Compensation):
    """A constant is added: what the neurons outside the mask add on average, W_down[:, pruned] mean(h)[pruned].

    The mean is over a calibration text: the bias of FLAP (arXiv 2312.11983), computed once, before any prompt.
    """

    name = "mean"
    summary = "adds a constant: the mean output of the neurons outside the mask on a calibration text"
    adds = True
    calibrates = True
    fits_experts = False
    fits_norms = False
    fits_repeats = False

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.layers * shape.width


COMPENSATIONS = (Nothing, MeanOutput)
