"""Choices that know h before it has been read: upper bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Choice, Inside, Token
from dart_eval.pruning.masks.counts import Budget, Counts, keep_counts
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ByHidden(Inside):
    """A token takes the k largest |h|, as if h were known before anything is read. No choice is better informed."""

    name = "hidden"
    summary = "chooses the largest |h|, as if it were known in advance (upper bound)"
    upper_bound = True

    def importance(self, token: Token) -> Tensor:
        return token.h.abs()


@dataclass(frozen=True, kw_only=True)
class TopP(Choice):
    """A token takes the fewest neurons with the share p of its sum of |h|, as if h were known beforehand.

    Their number differs between tokens and layers, so the bytes read are measured and not set.
    """

    name = "top-p"
    summary = "chooses the fewest neurons that reach the share p of sum |h| (upper bound; its read varies)"
    sized = False
    exact = False
    upper_bound = True
    p: float = option(0.9, "share of a token's sum |h| that the chosen neurons reach", above=0, most=1)

    def counts(self, budget: Budget) -> Counts:
        counts = [*budget.sizes]
        if not budget.whole_mask:
            counts = keep_counts(budget.densities, budget.sizes, budget.sparsity)
        return Counts(counts, counts, counts, 0)

    def choose(self, token: Token) -> Tensor:
        import torch

        assert token.allowed is not None
        mass, order = token.h.float().abs().masked_fill(~token.allowed, 0).sort(dim=-1, descending=True, stable=True)
        total = mass.cumsum(-1, dtype=torch.float64)
        needed = total - mass < self.p * total[..., -1:]  # the larger ones alone have less than the share
        return torch.zeros_like(needed).scatter_(-1, order, needed)
