"""Choice by the gate now and up in the context: that of dart-choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Choice, Token
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GateUp(Choice):
    """A token takes the largest |act(gate x)_j| * rms of (up x)_j over the context, and writes the largest |h| of them.

    It reads gate for the whole mask, up for the neurons taken, and down for those written. This choice is this
    project's own.
    """

    name = "gate-up"
    summary = "chooses the largest |act(gate x)| times the context's rms of up x, and writes the largest |h| among them"
    observes = True
    needs_up = True
    reads_whole = ("gate",)
    flops_per_neuron = 3  # a square, a factor and a sum
    mask_ratio: float = option(1.6, "neurons in the mask, as a multiple of those of a mask alone", least=1, most=3)  # type: ignore[misc]
    write_share: float = option(1.0, "share of the chosen neurons whose columns of down are read", above=0, most=1)  # type: ignore[misc]

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor | None:
        return None if up is None else (weight[:, None] @ up.square()).squeeze(1)

    def importance(self, token: Token) -> Tensor:
        score = token.gate.float().abs()
        return score if token.context_rms is None else score * token.context_rms
