"""The choice by thinned copies: what a token sees of |h| through a coarse image and the largest entries of x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.parts.base import option
from dart_eval.pruning.parts.choices import Thresholded, Token
from dart_eval.pruning.parts.images import Copy, Image

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.cost import ModelShape


@dataclass(frozen=True, kw_only=True)
class Shown(Thresholded):
    """The k neurons with the largest |h| as an image of gate and up and a thinned x show it, after Prox.

    Prox (arXiv 2607.27591, known here from digests only; no code found) takes those with |act(g)_j u_j| above a
    threshold a layer (`threshold=calibrated`: here the quantile over all neurons and tokens of the calibration text).
    g and u come from copies of gate and up in 4 bits (symmetric, a scale a row) and the largest entries of x; all three
    matrices of what is taken are then read exactly. As far as the digests say, it runs all tokens pruned where answers
    are scored, and counts a third of 16 bits for a weight of the copies, as measured; here 4 bits and the scales count.
    Our rounding fits each scale by least squares. Exact counts are ours.
    """

    name = "shown"
    summary = "takes the largest |h| that a coarse image of gate and up and the largest entries of x show"
    doubts = False
    gathers = True
    image: Image = option(Copy(bits=4, group=0), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    thin: float = option(0.5, "share of the entries of x, the largest, that the preview goes by", above=0, most=1)  # type: ignore[misc]

    def importance(self, token: Token) -> Tensor:
        assert token.preview is not None
        return token.preview.abs()

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        # the preview itself, and choosing by it
        return 2 * mask * self.thin * shape.width * (shape.ffn_matrices - 1) + 3 * mask
