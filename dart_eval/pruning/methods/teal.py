"""Each token leaves out columns of matrices, by their inputs: TEAL and WINA.

    teal   columns with |x_i| > t, a threshold for each layer and kind of input (arXiv 2408.14690)
    wina   columns with the k largest |x_i| * ||W[:, i]|| (arXiv 2505.19427)

x enters gate and up, h enters down. The columns' scales are always read, as they span several columns.

TEAL (5baaec8, `utils/utils.py`): t is the quantile of |x| over all inputs and tokens of a text. How many columns a
token reads varies and is measured. TEAL takes t off a histogram of x in 10 000 bins (1 % of outliers beyond it), of
which it assumes a mean of 0 and equal sides, on Alpaca; and it finds the sparsity of each matrix by a greedy search
(`allocation=greedy`, see `budgets`). By default every matrix has the same. Attention, which TEAL thins too, is dense
here.

WINA (8153dbf, `wina/mlp.py`): the released code has the norms of gate's columns alone; for up and down it takes the
largest |x_i|. The paper says all matrices (`entries.weigh=all`). k is int(n * (1 - s)) there; here what is cut off is
carried over layers. The code's `--transform`, which makes columns orthogonal first, is left out; attention is dense.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import bias_of, weight_matrix
from dart_eval.pruning.calibration import Calibration, Quantile
from dart_eval.pruning.counts import in_lines, keep_counts
from dart_eval.pruning.method import Measured, option
from dart_eval.pruning.methods.budgets import greedy
from dart_eval.pruning.rows import nbytes
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import served_bits, stored_inputs, stored_of

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.session import Session


class InputColumns(Measured):
    """Base of methods that leave out whole columns of the matrices as they are."""

    granularity = "input channels"

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        super().check(ffns, sparsity, bits)
        always = self.beside(ffns, sparsity) * OWN_BITS / (bits.total if bits else served_bits(ffns))
        if sparsity and always >= 1 - sparsity:
            raise UserError(
                f"{self.name} reads {100 * always:.1f} % of the bytes before it leaves out columns, and sparsity "
                f"{sparsity:g} leaves {100 * (1 - sparsity):.4g} %",
                f"use a sparsity up to {math.floor(1000 * (1 - always) - 1e-9) / 1000:g}",
            )

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        unit, everything = served_bits(ffns), ffns[0].matrices * sum(f.size for f in ffns)
        always = self.beside(ffns, sparsity) * OWN_BITS / unit if sparsity else 0.0
        self.counts = self.kept(sparsity + always, calibration)
        self.bits = [[*stored_inputs(f), stored_of(f.down)] for f in ffns]  # per layer and matrix, down last
        self._weights = [f.size / everything / unit for f in ffns]  # of a matrix's column in all bits
        self._beside = always / sum(f.matrices for f in ffns)  # read with each matrix
        read = gaps = total = scales = 0.0
        for ffn, bits, counts in zip(ffns, self.bits, self.counts, strict=True):
            for i, (stored, count) in enumerate(zip(bits, counts, strict=True)):
                read += ffn.size * (count / self.inputs(ffn, i) * stored.code + stored.scale)
                column = ffn.size * ffn.width / self.inputs(ffn, i) * stored.code  # bits of one
                gaps += count * (in_lines(column) - column) / ffn.width
                total += ffn.size * stored.total
                scales += ffn.size * stored.scale
        self._scales, self._gaps = scales / total, gaps / total
        self.fixed_read = read / total + always if sparsity else 1.0

    @staticmethod
    def inputs(ffn: FFN, matrix: int) -> int:
        """Return the columns of a matrix of an FFN, down last."""
        return ffn.size if matrix == ffn.matrices - 1 else ffn.width

    def kept(self, sparsity: float, calibration: Calibration | None) -> list[list[int]]:
        """Return the columns that tokens are to read, per layer and matrix: the same share of all.

        Args:
            sparsity: share of the columns that they do not read.
        """
        kept = [1 - sparsity] * len(self.ffns)
        of_x = keep_counts(kept, [f.width for f in self.ffns], sparsity)
        of_h = keep_counts(kept, [f.size for f in self.ffns], sparsity)
        return [[x] * (f.matrices - 1) + [h] for f, x, h in zip(self.ffns, of_x, of_h, strict=True)]

    def beside(self, ffns: Sequence[FFN], sparsity: float) -> float:
        """Return what every token reads beside columns / the FFN weights in 16 bits."""
        return 0.0

    def weighed(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        """Return the magnitudes of inputs of which thresholds leave the largest, [..., n]. x: [..., n]."""
        return x.abs()

    def quantiles(self, calibration: Calibration) -> list[Tensor]:
        """Return fp64 thresholds per layer and matrix that leave the counted inputs on the text, as one tensor."""
        quantiles = [[Quantile() for _ in counts] for counts in self.counts]

        def see(layer: int, x: Tensor, h: Tensor) -> None:
            for i, (quantile, count) in enumerate(zip(quantiles[layer], self.counts[layer], strict=True)):
                quantile.add(self.weighed(layer, i, h if i == len(quantiles[layer]) - 1 else x), count)

        calibration.visit(see)
        return [torch.tensor([[one.threshold for one in of_layer] for of_layer in quantiles], dtype=torch.float64)]

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

        parts = len(matrices)

        def forward(x: Tensor) -> Tensor:
            if session.phase != "decode":
                return own(x)
            chosen = [self.columns(ffn.layer, i, session.in_batch(x)).view(x.shape) for i in matrices]
            for i, columns in zip(matrices, chosen, strict=True):
                self._count(ffn, i, session.in_batch(columns))
            if parts == 1:
                return self.product(ffn.layer, matrices[0], x, chosen[0], own)
            biases = [None] * parts if (bias := bias_of(module)) is None else bias.chunk(parts)
            products = [
                self.product(ffn.layer, i, x, columns, functools.partial(nn.functional.linear, weight=w, bias=b))
                for i, columns, w, b in zip(matrices, chosen, weight_matrix(module).chunk(parts), biases, strict=True)
            ]
            return torch.cat(products, dim=-1)

        return forward

    def product(self, layer: int, matrix: int, x: Tensor, columns: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what stands for a matrix's product.

        Args:
            x: [..., n], its inputs.
            columns: [..., n] bool, those that each token reads.
            own: gives the product.
        """
        return own(x * columns)

    def _count(self, ffn: FFN, matrix: int, columns: Tensor) -> None:
        bits = self.bits[ffn.layer][matrix]
        share = columns.sum(-1, dtype=torch.float64).cpu() / columns.shape[-1]
        read = (share * bits.code + bits.scale) * self._weights[ffn.layer]
        self.count(read + self._beside if self._beside else read)

    def fetched(self, read: float) -> float:
        """Matrices lie by columns, each from a line on; scales, and what is read beside columns, from end to end."""
        return read + self._gaps

    def computed(self, read: float) -> float:
        return (read - self._scales) / (1 - self._scales)


class Budgeted(InputColumns):
    """Base of teal and wina, whose matrices may share a layer's budget otherwise than equally."""

    allocation: Literal["uniform", "greedy"] = option(
        "uniform", "give every matrix one sparsity, or search those of each layer's on a calibration text, as TEAL does"
    )

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.allocation == "greedy"

    def kept(self, sparsity: float, calibration: Calibration | None) -> list[list[int]]:
        if self.allocation == "uniform" or not sparsity:
            return super().kept(sparsity, calibration)
        assert calibration is not None
        name = f"greedy budgets of {self.spec}, {sparsity} left out"
        (found,) = calibration.once(name, lambda: self._searched(sparsity, calibration))
        return [
            [round((1 - share) * self.inputs(f, i)) for i, share in enumerate(shares)]
            for f, shares in zip(self.ffns, found.tolist(), strict=True)
        ]

    def _searched(self, sparsity: float, calibration: Calibration) -> list[Tensor]:
        return [torch.tensor(greedy(self.ffns, sparsity, calibration, self.best), dtype=torch.float64)]

    def best(self, layer: int, matrix: int, x: Tensor, count: int) -> Tensor:
        """Return the columns that tokens read if they read so many: [T, n] bool. x: [T, n]."""
        raise NotImplementedError


class Teal(Budgeted):
    """Columns of the inputs above a threshold."""

    name = "teal"
    summary = "leaves out the columns of each matrix whose inputs are small, not neurons"
    paper = "2408.14690"
    recorded: ClassVar = {"entries": "threshold"}
    calibrates = True

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        assert calibration is not None
        self.thresholds: list[list[float]] = []
        if sparsity:
            name = f"quantiles of inputs, {self.counts} read"
            self.thresholds = calibration.once(name, lambda: self.quantiles(calibration))[0].tolist()

    def best(self, layer: int, matrix: int, x: Tensor, count: int) -> Tensor:
        quantile = Quantile()
        quantile.add(x, count)
        return x.abs() > quantile.threshold

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        return x.abs() > self.thresholds[layer][matrix]

    def nbytes(self) -> int:
        return 4 * sum(len({*of_layer}) for of_layer in self.thresholds)  # under one sparsity gate and up have the same

    def step_flops(self, shape: ModelShape) -> float:
        return shape.layers * shape.width + sum(shape.ffn_sizes)  # gate and up have one input


class Wina(Budgeted):
    """Columns of the k largest inputs times norms."""

    name = "wina"
    summary = "leaves out the columns of each matrix whose input times norm is small, not neurons"
    paper = "2505.19427"
    recorded: ClassVar = {"entries": "norms"}
    entries_weigh: Literal["gate", "all"] = option(
        "gate", "matrices whose column norms count: gate, as in the released code, or all, as in the paper"
    )

    @torch.no_grad()
    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        weighed = (ffn.matrices if self.entries_weigh == "all" else 1 for ffn in ffns)
        self.norms = [
            [w.float().norm(dim=0) for w in [*f.input_weights(), f.output_weight()][:count]]
            for f, count in zip(ffns if sparsity else (), weighed, strict=False)
        ]
        super().fit(ffns, sparsity, calibration)

    def best(self, layer: int, matrix: int, x: Tensor, count: int) -> Tensor:
        norms = self.norms[layer]
        score = x.abs().float() * norms[matrix].to(x.device) if matrix < len(norms) else x.abs()
        return top_k_mask(score, torch.full(x.shape[:-1], count))

    def columns(self, layer: int, matrix: int, x: Tensor) -> Tensor:
        return self.best(layer, matrix, x, self.counts[layer][matrix])

    def nbytes(self) -> int:
        return nbytes(self.norms)

    def step_flops(self, shape: ModelShape) -> float:
        every = self.entries_weigh == "all"
        weighed = shape.ffn_matrices - 1 if every else 1
        return shape.layers * shape.width * (weighed + 1) + sum(shape.ffn_sizes) * (1 + every)
