"""R-Sparse (arXiv 2504.19449): columns with large inputs, and a low-rank product of all other inputs.

    W  = U S V^T, its singular values,   s_i = ||row i of V S||
    m  = |x_i| s_i > t,   t the quantile of a calibration text that leaves k columns
    y  = W (m * x) + U_r S_r V_r^T ((1 - m) * x)

Of what a token reads `budget.columns` goes to columns and the rest to U_r S_r and V_r, so r = (1 - budget.columns) read
n out / (n + out), rounded down. In the authors' code (VITA-Group/R-Sparse, 59e9a8e, `models/modeling_llama.py`,
`utils/setup.py`) each matrix has a share of its own from an evolutionary search for Llama 3 8B at .5, which is left out
here: the FFN's there are .986 (gate), .992 (up) and .996 (down) on average. Without its file one share serves all, as
here. There t is that of one passage of 512 tokens of WikiText-2's train split, factors are rounded to fp16, and of a
prompt the last tenth runs so, too. Attention, which it thins too, is dense here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.method import option
from dart_eval.pruning.methods.teal import InputColumns
from dart_eval.pruning.rows import nbytes

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape


class RSparse(InputColumns):
    """Columns of the inputs above a threshold, and a low-rank rest."""

    name = "rsparse"
    summary = "leaves out the columns of each matrix whose input is small, with a low-rank product in their place"
    paper = "2504.19449"
    calibrates = True
    budget_columns: float = option(0.99, "share of the read that goes to columns; the rest to factors", above=0, most=1)

    def rank(self, ffn: FFN, sparsity: float) -> int:
        """Return r, of every matrix of an FFN."""
        return int((1 - self.budget_columns) * (1 - sparsity) * ffn.size * ffn.width / (ffn.size + ffn.width) + 1e-9)

    def beside(self, ffns: Sequence[FFN], sparsity: float) -> float:
        factors = sum(f.matrices * self.rank(f, sparsity) * (f.size + f.width) for f in ffns)
        return factors / sum(f.matrices * f.size * f.width for f in ffns)

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        assert calibration is not None
        self.factors: list[list[tuple[Tensor, Tensor]]] = []  # per layer and matrix U S [out, r], V [n, r]
        self.scales: list[list[Tensor]] = []  # likewise s, [n] fp32
        self.thresholds: list[list[float]] = []
        for ffn in ffns if sparsity else ():
            self.factors.append([])
            self.scales.append([])
            for w in (*ffn.input_weights(), ffn.output_weight()):
                u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
                r = self.rank(ffn, sparsity)
                self.scales[-1].append((v.T * s).norm(dim=1).float())
                self.factors[-1].append(((u[:, :r] * s[:r]).to(w.dtype), v[:r].T.to(w.dtype)))
        if sparsity:
            name = f"quantiles of inputs times singular values, {self.counts} read"
            self.thresholds = calibration.once(name, lambda: self.quantiles(calibration))[0].tolist()

    def weighed(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        return (x.float() * self.scales[layer][matrix].to(x.device)).abs()

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        return self.weighed(layer, matrix, x) > self.thresholds[layer][matrix]

    def product(self, layer: int, matrix: int, x: Tensor, columns: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        left, right = (factor.to(x.device) for factor in self.factors[layer][matrix])
        return own(x * columns) + ((x * ~columns) @ right) @ left.T

    def nbytes(self) -> int:
        return nbytes(self.scales) + 8 * sum(map(len, self.thresholds))

    def weight_bytes(self, fast: bool) -> int:
        return nbytes(self.factors)

    def step_flops(self, shape: ModelShape) -> float:
        """A product with s and a comparison for each input: the factors' products are in what a token reads."""
        return 2 * (shape.layers * shape.width * (shape.ffn_matrices - 1) + sum(shape.ffn_sizes))
