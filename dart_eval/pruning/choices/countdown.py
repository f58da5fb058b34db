"""Choice by up, after M-COUNTDOWN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Choice, Token

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ByUp(Choice):
    """A token takes the k neurons with the largest |up x|, after M-COUNTDOWN (arXiv 2505.17701), its ideal form.

    Its practical form takes those above a threshold, which its code (COUNTDOWN at e1393ae) sets on the train splits of
    the tasks that are evaluated.
    """

    name = "up"
    summary = "chooses the largest |up x|, and reads up whole"
    reads_whole = ("up",)

    def importance(self, token: Token) -> Tensor:
        return token.up.abs()
