"""Choice by a rounded copy and a thinned x, after Prox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.images import Columns, Copy, Image
from dart_eval.pruning.choices.preview import Previewing
from dart_eval.pruning.choices.thresholds import Thresholded
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Prox(Thresholded, Previewing):
    """The k neurons with the largest |h| as an image of gate and up and a thinned x show it, after Prox.

    Prox (arXiv 2607.27591, known here from digests only; no code found) takes those with |act(g)_j u_j| above a
    threshold a layer (`threshold=calibrated`: here the quantile over all neurons and tokens of the calibration text).
    g and u come from copies of gate and up in 4 bits (symmetric, a scale a row) and the largest entries of x; all three
    matrices of what is taken are then read exactly. As far as the digests say, it runs all tokens pruned where answers
    are scored, and counts a third of 16 bits for a weight of the copies, as measured; here 4 bits and the scales count.
    Our rounding fits each scale by least squares. Exact counts are ours.
    """

    name = "shown"
    summary = "chooses the largest |h| by a preview of gate and up and the largest entries of x"
    uses_row_errors = False
    gathers = True
    image: Image = option(Copy(bits=4, group=0), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    thin: float = option(0.5, "share of the entries of x, largest first, that the preview uses", above=0, most=1)

    def columns(self, width: int) -> Columns:
        return Columns(max(1, int(self.thin * width + 1e-9)) / width)

    def parts_of(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        import torch

        from dart_eval.kernels.top import top_k_mask

        if self.thin == 1:
            return x, None
        count = round(self.columns(x.shape[-1]).fine * x.shape[-1])
        return x * top_k_mask(x.abs(), torch.full(x.shape[:-1], count)), None

    def importance(self, token: Token) -> Tensor:
        assert token.preview is not None
        return token.preview.abs()

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        # the preview, and the choice
        return 2 * mask * self.thin * shape.width * (shape.ffn_matrices - 1) + 3 * mask
