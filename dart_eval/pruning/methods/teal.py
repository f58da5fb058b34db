"""Each token leaves out columns of matrices, by their inputs: TEAL and WINA.

    teal   columns with |x_i| > t, a threshold for each layer and kind of input (arXiv 2408.14690)
    wina   columns with the k largest |x_i| * ||W[:, i]|| (arXiv 2505.19427)

x enters gate and up, h enters down. The columns' scales are always read, as they span several columns.

TEAL (5baaec8, `utils/utils.py`): t is the quantile of |x| over all inputs and tokens of a text. How many columns a
token reads varies and is measured. TEAL takes t off a histogram of x in 10 000 bins (1 % of outliers beyond it), of
which it assumes a mean of 0 and equal sides, on Alpaca; and it finds the sparsity of each matrix by a greedy search,
which is left out here: every matrix has the same. Attention, which TEAL thins too, is dense here.

WINA (8153dbf, `wina/mlp.py`): the released code has the norms of gate's columns alone; for up and down it takes the
largest |x_i|. The paper says all matrices (`entries.weigh=all`). k is int(n * (1 - s)) there; here what is cut off is
carried over layers. The code's `--transform`, which makes columns orthogonal first, is left out; attention is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import bias_of, weight_matrix
from dart_eval.pruning.calibration import Calibration, Quantile
from dart_eval.pruning.counts import keep_counts
from dart_eval.pruning.method import Measured, option
from dart_eval.pruning.rows import nbytes
from dart_eval.weights.rounding import served_bits, stored_inputs, stored_of

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.session import Session


class InputColumns(Measured):
    """Base of methods that leave out whole columns of the matrices as they are."""

    granularity = "input channels"

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        kept = [1 - sparsity] * len(ffns)
        of_x = keep_counts(kept, [f.width for f in ffns], sparsity)
        self.counts = [*zip(of_x, keep_counts(kept, [f.size for f in ffns], sparsity), strict=True)]
        self.bits = [[*stored_inputs(f), stored_of(f.down)] for f in ffns]  # per layer and matrix, down last
        unit, everything = served_bits(ffns), ffns[0].matrices * sum(f.size for f in ffns)
        self._weights = [f.size / everything / unit for f in ffns]  # of a matrix's column in all bits
        read = total = scales = 0.0
        for ffn, bits, (x, h) in zip(ffns, self.bits, self.counts, strict=True):
            for i, stored in enumerate(bits):
                share = h / ffn.size if i == ffn.matrices - 1 else x / ffn.width
                read += ffn.size * (share * stored.code + stored.scale)
                total += ffn.size * stored.total
                scales += ffn.size * stored.scale
        self._scales = scales / total
        self.fixed_read = read / total if sparsity else 1.0

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        """Return [..., n] bool, the columns that each token reads.

        Args:
            matrix: of the FFN, down last. x: [..., n], its inputs.
        """
        raise NotImplementedError

    def forwards(self, session: Session) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for ffn in self.ffns if self.sparsity else ():
            matrices = iter(range(ffn.matrices))
            for module in ffn.projections:
                of_module = [next(matrices) for _ in range(1 + (ffn.fused and module is ffn.up))]
                forwards[module] = self._thinned(session, ffn, of_module, module)
        return forwards

    def _thinned(
        self, session: Session, ffn: FFN, matrices: Sequence[int], module: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        """Return the forward of a projection. matrices: that it holds; of gate and up each reads inputs of its own."""
        own = module.forward

        def forward(x: Tensor) -> Tensor:
            if session.phase != "decode":
                return own(x)
            inputs = [self._thin(ffn, i, session.in_batch(x)).view(x.shape) for i in matrices]
            if len(inputs) == 1:
                return own(inputs[0])
            biases = [None, None] if (bias := bias_of(module)) is None else bias.chunk(2)
            parts = zip(inputs, weight_matrix(module).chunk(2), biases, strict=True)
            return torch.cat([nn.functional.linear(*part) for part in parts], dim=-1)

        return forward

    def _thin(self, ffn: FFN, matrix: int, x: Tensor) -> Tensor:
        """Zero the inputs that tokens leave out, and count the rest."""
        columns, bits = self.columns(ffn.layer, matrix, x), self.bits[ffn.layer][matrix]
        share = columns.sum(-1, dtype=torch.float64).cpu() / x.shape[-1]
        self.count((share * bits.code + bits.scale) * self._weights[ffn.layer])
        return x * columns

    def computed(self, read: float) -> float:
        return (read - self._scales) / (1 - self._scales)


class Teal(InputColumns):
    """Columns of the inputs above a threshold."""

    name = "teal"
    summary = "leaves out the columns of each matrix whose inputs are small, not neurons"
    paper = "2408.14690"
    recorded: ClassVar = {"allocation": "uniform", "entries": "threshold"}
    calibrates = True

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        assert calibration is not None
        self.thresholds: list[list[float]] = []
        if sparsity:
            name = f"quantiles of inputs, {self.counts} read"
            self.thresholds = calibration.once(name, lambda: [self._quantiles(calibration)])[0].tolist()

    def _quantiles(self, calibration: Calibration) -> Tensor:
        """Return [L, 2] fp64 thresholds for x and h that leave these numbers of inputs on the text."""
        quantiles = [[Quantile(), Quantile()] for _ in self.ffns]

        def see(layer: int, *sides: Tensor) -> None:
            for quantile, values, count in zip(quantiles[layer], sides, self.counts[layer], strict=True):
                quantile.add(values, count)

        calibration.visit(see)
        return torch.tensor([[side.threshold for side in sides] for sides in quantiles], dtype=torch.float64)

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        return x.abs() > self.thresholds[layer][matrix == self.ffns[layer].matrices - 1]

    def nbytes(self) -> int:
        return 8 * len(self.thresholds)

    def step_flops(self, shape: ModelShape) -> float:
        return shape.layers * shape.width + sum(shape.ffn_sizes)  # gate and up have one input


class Wina(InputColumns):
    """Columns of the k largest inputs times norms."""

    name = "wina"
    summary = "leaves out the columns of each matrix whose input times norm is small, not neurons"
    paper = "2505.19427"
    recorded: ClassVar = {"allocation": "uniform", "entries": "norms"}
    entries_weigh: Literal["gate", "all"] = option(
        "gate", "matrices whose column norms count: gate, as in the released code, or all, as in the paper"
    )

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        weighed = (ffn.matrices if self.entries_weigh == "all" else 1 for ffn in ffns)
        self.norms = [
            [w.float().norm(dim=0) for w in [*f.input_weights(), f.output_weight()][:count]]
            for f, count in zip(ffns if sparsity else (), weighed, strict=False)
        ]

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        ffn, norms = self.ffns[layer], self.norms[layer]
        score = x.abs().float() * norms[matrix].to(x.device) if matrix < len(norms) else x.abs()
        return top_k_mask(score, torch.full(x.shape[:-1], self.counts[layer][matrix == ffn.matrices - 1]))

    def nbytes(self) -> int:
        return nbytes(self.norms)

    def step_flops(self, shape: ModelShape) -> float:
        every = self.entries_weigh == "all"
        weighed = shape.ffn_matrices - 1 if every else 1
        return shape.layers * shape.width * (weighed + 1) + sum(shape.ffn_sizes) * (1 + every)
