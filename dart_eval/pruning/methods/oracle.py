"""Oracle: a mask that sees what is to come. No method to use: a mark of how far foresight alone goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_eval.errors import UserError
from dart_eval.pruning import scores
from dart_eval.pruning.method import Calibration, PromptMethod


@dataclass(frozen=True)
class Oracle(PromptMethod):
    """GRIFFIN's score over the tokens that are then scored under the mask, instead of over the prompt's.

    Attributes:
        normalise: the norm that a token is divided by: none, l1 or l2
        down_norm: weigh a neuron by the norm of its down column
    """

    name = "oracle"
    summary = "looks ahead: one mask from the very tokens that it is used on (a mark, no method)"
    looks_ahead = True
    normalise: str = "l2"
    down_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise not in scores.NORMALISATIONS:
            raise UserError(f"oracle: normalise must be one of {', '.join(scores.NORMALISATIONS)}")

    def energy(self, h: Tensor, weight: Tensor) -> Tensor:
        return scores.energy(h, weight, self.normalise)

    def neuron_weights(self, calibration: Calibration) -> list[Tensor] | None:
        return scores.down_norms(calibration.ffns) if self.down_norm else None
