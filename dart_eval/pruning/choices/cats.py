"""Choice by the gate, after CATS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.thresholds import Thresholded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ByGate(Thresholded):
    """A token takes the k neurons with the largest |act(gate x)|, after CATS (arXiv 2404.08763).

    CATS takes those above a threshold (`threshold=calibrated`): the quantile of |act(gate x)| over all neurons and
    tokens of a text, layer by layer. Its code (CATS at 679959c) finds it in 1000 bins between -1 and 1 on RefinedWeb;
    here bins are .1 % wide and have no end. There prompts run pruned too, and the model is then fine-tuned.
    """

    name = "gate"
    summary = "chooses the largest |act(gate x)|, and reads gate for the whole mask"
    reads_whole = ("gate",)

    def importance(self, token: Token) -> Tensor:
        return token.gate.abs()
