"""GRIFFIN (arXiv 2404.01365): one mask per prompt from token-normalised activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_eval.pruning import scores
from dart_eval.pruning.method import PromptMethod


@dataclass(frozen=True)
class Griffin(PromptMethod):
    """score_j = || h_tj / ||h_t||_2 ||_2 over the prompt's tokens t; the same count in every layer.

    The sum of squares is kept: its order is that of its root.
    """

    name = "griffin"
    summary = "per prompt, token-normalised activations, uniform over layers"

    def energy(self, h: Tensor, weight: Tensor) -> Tensor:
        return scores.energy(h, weight, normalise="l2")
