"""LaRoSA (arXiv 2507.01299): each token reads the columns with the largest inputs after a rotation.

    H  = sum_t x_t x_t^T,   x the inputs of a layer's FFN on a calibration text
    Q  = the eigenvectors of H                                                             [D, D]
    y  = (W Q) (m * Q^T x),   m the k largest |Q^T x|,   W gate or up;   of down the k largest |h|, unrotated

Activations lie mostly along few eigenvectors, so that what is left out is smaller than without Q. The authors' code
(alibaba/EfficientAI, 3d32ae4, `larosa/gen_act`, `larosa/inference/mlp.py`) makes Q of 10 sequences of 2048 tokens of
WikiText-2's train split, with a damping of H that leaves its eigenvectors, and takes a threshold of TEAL's in place of
the paper's top k. W Q is stored in place of W. Q itself is multiplied once for every token, and its bytes count as
read, so that fewer columns are left: D / (3 F) of a gated FFN. (Layers have rotations of their own, so that one that is
folded into the weights before it leaves a change of basis of as many bytes.) Attention, which it rotates too, is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.methods.teal import InputColumns
from dart_eval.pruning.rows import nbytes

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape


class Larosa(InputColumns):
    """Columns of the k largest inputs, rotated by the eigenvectors of a text."""

    name = "larosa"
    summary = "leaves out the columns of each matrix whose rotated input is small, not neurons"
    paper = "2507.01299"
    calibrates = True

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        assert calibration is not None
        self.rotations: list[Tensor] = []  # per layer [D, D], a column an eigenvector
        if sparsity:
            found = calibration.once("eigenvectors of inputs", lambda: self._rotations(calibration))
            dtypes = [torch.promote_types(f.dtype or torch.float32, torch.float32) for f in ffns]
            self.rotations = [q.to(dtype) for q, dtype in zip(found, dtypes, strict=True)]

    def _rotations(self, calibration: Calibration) -> list[Tensor]:
        sums = [torch.zeros(f.width, f.width, dtype=torch.float64) for f in self.ffns]

        def see(layer: int, x: Tensor, _h: Tensor) -> None:
            sums[layer] += (x.double().T @ x.double()).cpu()

        calibration.visit(see)
        return [torch.linalg.eigh(h).eigenvectors for h in sums]

    def beside(self, ffns: Sequence[FFN], sparsity: float) -> float:
        return sum(f.width**2 for f in ffns) / sum(f.matrices * f.size * f.width for f in ffns)

    def rotated(self, layer: int, matrix: int, x: Tensor, back: bool = False) -> Tensor:
        """Return Q^T x, or Q x, of the inputs of gate and up, [..., D]; of down they stay. In fp32 at least."""
        if matrix == self.ffns[layer].matrices - 1:
            return x
        q = self.rotations[layer].to(x.device)
        return x.to(q.dtype) @ (q.T if back else q)

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        kept = torch.full(x.shape[:-1], self.counts[layer][matrix])
        return top_k_mask(self.rotated(layer, matrix, x).abs(), kept)

    def product(self, layer: int, matrix: int, x: Tensor, columns: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        thinned = self.rotated(layer, matrix, x) * columns
        return own(self.rotated(layer, matrix, thinned, back=True).to(x.dtype))

    def weight_bytes(self, fast: bool) -> int:
        return nbytes(self.rotations)

    def step_flops(self, shape: ModelShape) -> float:
        return shape.layers * (2 * shape.width**2 + shape.width) + sum(shape.ffn_sizes)
