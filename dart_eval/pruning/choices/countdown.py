"""Choice by up, after M-COUNTDOWN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.thresholds import Thresholded

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.pruning.calibration.inputs import MeanLeast


@dataclass(frozen=True, kw_only=True)
class ByUp(Thresholded):
    """A token takes the k neurons with the largest |up x|, after M-COUNTDOWN (arXiv 2505.17701), its ideal form.

    Its practical form takes those above a threshold (`threshold=calibrated`): the mean over tokens of each token's
    k-th largest |up x|, layer by layer. Its code (COUNTDOWN at e1393ae) takes the train splits of the tasks that are
    evaluated for this, and counts k of up's rows alone; here it is the calibration text, and k follows from all bytes.
    """

    name = "up"
    summary = "chooses the largest |up x|, and reads up for the whole mask"
    reads_whole = ("up",)

    def importance(self, token: Token) -> Tensor:
        return token.up.abs()

    def least(self) -> MeanLeast:
        from dart_eval.pruning.calibration.inputs import MeanLeast

        return MeanLeast()
