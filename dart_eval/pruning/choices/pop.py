"""A choice with a core: some neurons are always computed, and each token ranks the candidates anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import AnyChoice, Token
from dart_eval.pruning.masks.counts import Budget, Counts, exact_counts
from dart_eval.pruning.part import option
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Candidates(AnyChoice):
    """Each token computes the core of its mask, and of the candidates those with the largest score of this very token.

    A token computes k of F neurons. Of the mask's ranking the first k - width * k are the core (R), the next width * F
    are the candidates (C), all others are left out (P). The mask is core and candidates: their rows of gate and up are
    read, since h ranks the candidates; columns of down are read of the k alone. So with 3 matrices

        3 * read * F = 2 * (k + width * (F - k)) + k

    and the sparsity is met with a k that is smaller than that of a mask alone. width=0 is the mask alone; width=1 ranks
    all neurons by each token, and reads gate and up whole.

    Of arXiv 2602.06822 (POP), read in digests, and no code was found: three sets from the prompt's scores, a Wanda-like
    importance, candidates ranked by the current token, width .1. How the candidates lie around the cut (here in the
    proportion of what is kept and what is not, so that widths reach from 0 to 1) and a token's importance (the mask's
    score of this token alone) are ours. POP takes k for its budget; here what the candidates read counts too.
    """

    name = "candidates"
    summary = "computes the core of the mask, and the candidates with the highest scores for this token"
    ranks = True
    fits_experts = False
    reads_whole = ("gate", "up")
    width: float = option(0.1, "share of the neurons that are candidates", least=0, most=1)

    def core(self, taken: Tensor) -> Tensor:
        """Return the size of the core, long. taken: neurons that a token takes, any shape."""
        return ((1 - self.width) * taken.double() + 1e-9).floor().long()

    def _taken(self, read: float, matrices: int) -> float:
        """Return the share of the neurons that a token takes. read: share of the weights that it reads."""
        ranked = matrices - 1
        return (matrices * read - ranked * self.width) / (ranked * (1 - self.width) + 1)

    def mask_share(self, read: float, matrices: int) -> float:
        taken = self._taken(read, matrices)
        return min(1.0, taken + self.width * (1 - taken))

    def counts(self, budget: Budget) -> Counts:
        densities, sizes, sparsity, matrices, *_ = budget
        everything, whole = sum(sizes), matrices - 1
        kept = round((1 - sparsity) * everything)
        if kept == everything:
            return Counts(list(sizes), list(sizes), list(sizes), whole)
        rows = matrices * kept
        if rows < whole * self.width * everything:
            most = 1 - whole * self.width / matrices
            raise UserError(
                f"{self.title} ranks {self.width:g} of the neurons by {whole} of the FFN's {matrices} matrices, and to "
                f"read these is more than sparsity {sparsity:g} leaves",
                f"use a sparsity up to {math.floor(100 * most) / 100:g}, or a smaller choice.width",
            )
        share = [max(0.0, self._taken(r, matrices)) for r in densities]
        # A layer with less than its candidates would take has fewer of them.
        wide = [min(k + self.width * (1 - k), matrices * r / whole, 1.0) for k, r in zip(share, densities, strict=True)]
        wanted = [w * n for w, n in zip(wide, sizes, strict=True)]
        masked = max(kept, min(everything, rows // whole, round(sum(wanted))))
        mask = exact_counts(wanted, sizes, masked)
        taken = exact_counts([k * n for k, n in zip(share, sizes, strict=True)], mask, rows - whole * masked)
        return Counts(mask, taken, taken, whole)

    def importance(self, token: Token) -> Tensor:
        assert token.alone is not None and token.core is not None
        return token.alone().masked_fill(token.core, math.inf)

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return 3 * self.width * sum(shape.ffn_sizes)  # a candidate's square, its factor, a comparison with the core's
