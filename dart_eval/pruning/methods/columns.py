"""Each token reads more bits of the columns whose inputs are larger: GRINQH and DecDEC.

A token reads the first b_i bits of column i of a matrix. The bits b_i, each one of `entries.levels`, make the expected
squared error of the product small within the bits that the read allows:

    sum_i x_i^2 E(b_i),   E(b) = ||W - W(b)||^2 / n,   sum_i b_i <= bits

Steps from level to level are taken in the order of the error that they save for a bit, by the convex hull of E, until
the next step no longer fits. No other choice of as many bits has less error where E is convex. All tokens read the same
number of bits, or one step less. Of down, the inputs are the neurons' h. An E of each column by itself would have to be
read by every token, and saves less than it costs (results/columns.md).

GRINQH (arXiv 2606.23419, its abstract) reads 0 to 8 bits of nested codes by thresholds on |x_i|. DecDEC (2412.20185,
SNU-ARC/DecDEC at 7a3323f) reads 3-bit weights, and 4-bit residuals of the columns with the largest |x_i|: its levels
are 3-7, where its base is rounded by itself. TEAL's levels are 0 and all bits. Prompts read all bits of the codes, so
that codes can replace the weights. With the levels 0-2-4-6-8 a kernel for CPUs reads the chosen bits alone
(`kernels.cpu.columns`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dart_eval.kernels import fast
from dart_eval.kernels.cpu import columns as kernel
from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import bias_of, plain_matrix
from dart_eval.pruning.caches import WeightCache, codes_of
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.counts import in_lines
from dart_eval.pruning.method import Measured, option
from dart_eval.pruning.rows import nbytes
from dart_eval.util.bits import OWN_BITS, Rounding, Stored
from dart_eval.util.errors import UserError
from dart_eval.weights.decoded import Decoded
from dart_eval.weights.rounding import parameter_of

if TYPE_CHECKING:
    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.session import Session

LevelsText = Literal[
    "0-2-3-4-5-6-8", "0-1-2-3-4-5-6-7-8", "0-2-3-4-5-6", "0-2-4-6-8", "0-2-4-8", "0-4-8", "0-8", "2-4-8", "3-7", "4-8",
    "8",
]  # fmt: skip
TOLERANCE = 0.5 / OWN_BITS  # half a bit beyond the last level: scales of rows of other widths take other bytes
_CODES: WeightCache[list[Nested]] = WeightCache()
_KERNELS: WeightCache[kernel.ColumnsFFN] = WeightCache()


class Levels:
    """Bits in which a column may be read, ascending; the last number is a code's bits.

    Args:
        text: `0-2-4-8`.
        group: number of weights that share a scale; 0: a whole row.

    Attributes:
        bits: the levels.
        step: bits between neighbouring levels; None if they differ.
        rounding: of the codes.
    """

    def __init__(self, text: str, group: int) -> None:
        self.bits = [int(word) for word in text.split("-")]
        steps = {b - a for a, b in itertools.pairwise(self.bits)}
        self.step = steps.pop() if len(steps) == 1 else None
        self.rounding = Rounding(self.bits[-1], group)

    def scale(self, width: int) -> float:
        """Return the bits of a scale per weight, in rows of `width` weights. They are always read."""
        return self.rounding.weight_bits(width) - self.rounding.bits

    def limit(self, width: int, room: float) -> int:
        """Return the bits of codes that a token may read of a row. room: bits of a weight, without its scale."""
        return min(int(width * room + 1e-9), self.bits[-1] * width)

    def read(self, share: float, width: int) -> float:
        """Return the share of the bytes of a row of 16-bit weights that a token reads, if it may read `share`."""
        limit = self.limit(width, OWN_BITS * share - self.scale(width))
        if self.step:  # of other levels a token may find no step that fits the last bits
            limit -= (limit - self.bits[0] * width) % self.step
        return (limit / width + self.scale(width)) / OWN_BITS

    def gains(self, errors: Tensor) -> Tensor:
        """Return [levels - 1] fp32, the error that each step to the next level saves for a bit; never rising.

        These are the slopes of the convex hull of the errors over bits: steps that save more together than the first of
        them alone are one step. (Two bits of weights among much larger ones may be worse than none.)

        Args:
            errors: [levels], the squared error of a column at each level.
        """
        bits, steps = self.bits, range(len(self.bits) - 1)
        slopes = {(a, b): (errors[a] - errors[b]) / (bits[b] - bits[a]) for b in range(len(bits)) for a in range(b)}
        gains = []
        for step in steps:
            best = [torch.stack([slopes[a, b + 1] for b in steps[step:]]).amax(0) for a in steps[: step + 1]]
            gains.append(torch.stack(best).amin(0).clamp(min=0))
        return torch.stack(gains) if gains else errors[:0]

    def choose(self, x: Tensor, gains: Tensor, bits: int) -> Tensor:
        """Return [..., n] long, the level of each column, counted from 0.

        Args:
            x: [..., n], the inputs. gains: see `gains`. bits: that a token reads of all.
        """
        each = x.float().square()[..., None, :] * gains[:, None].to(x.device)
        shape, saved = each.shape[-2:], each.flatten(-2)
        if step := self.step:  # the largest ones, which need no sorting
            keep = torch.tensor(min((bits - self.bits[0] * x.shape[-1]) // step, saved.shape[-1]))
            return top_k_mask(saved, keep).unflatten(-1, shape).sum(-2)
        order = saved.argsort(dim=-1, descending=True, stable=True)  # of equal steps the lower level's first
        cost = torch.tensor(self.bits, device=x.device).diff()[:, None].expand(shape).flatten()
        fits = cost[order].cumsum(-1) <= bits - self.bits[0] * x.shape[-1]
        return torch.zeros_like(fits).scatter(-1, order, fits).unflatten(-1, shape).sum(-2)


class Nested:
    """A matrix of which tokens read first bits of codes.

    Args:
        levels: bits in which columns are read.
        weight: [out, n].
        bias: [out]; None.
        room: bits of a weight that a token may read, without its scale.

    Attributes:
        rows, width: its outputs, and n, its inputs.
        limit: bits of codes that a token may read of a row.
        values: of each level's first bits, [out, n]; None for 0 bits.
        gains: what each step to the next level saves for a bit (`Levels.gains`).
    """

    @torch.no_grad()
    def __init__(self, levels: Levels, weight: Tensor, bias: Tensor | None, room: float) -> None:
        self.levels, self.bias, (self.rows, self.width) = levels, bias, weight.shape
        self.limit, self.scale = levels.limit(self.width, room), levels.scale(self.width)
        self.packed = codes_of(weight, levels.rounding)
        self.values = [Decoded(self.packed, weight.dtype, bits) if bits else None for bits in levels.bits]
        read = (self.packed.decoded(torch.float32, bits) if bits else 0.0 for bits in levels.bits)
        errors = torch.stack([(weight.float() - values).square().sum(0).mean() for values in read])
        self.gains = levels.gains(errors)

    def whole(self, x: Tensor) -> Tensor:
        """Return the product with all bits of the codes, [..., out]. x: [..., n]."""
        values = self.values[-1]
        assert values is not None
        return nn.functional.linear(x, values(), self.bias)

    def choose(self, x: Tensor) -> Tensor:
        """Return [..., n] long, the level of each column. x: [..., n]."""
        return self.levels.choose(x, self.gains, self.limit)

    def product(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the product, [..., out], in fp32 at least. level: [..., n], of each column."""
        out: Tensor | float = 0.0
        for number, values in enumerate(self.values):
            if values is not None:
                product = nn.functional.linear(x * (level == number), values())
                out = out + product.to(torch.promote_types(product.dtype, torch.float32))
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias

    def row_bits(self, level: Tensor) -> Tensor:
        """Return the bits that a row takes, [...] fp64 on the CPU. level: [..., n], of each column."""
        bits = torch.tensor(self.levels.bits, device=level.device)[level].sum(-1, dtype=torch.float64)
        return bits.cpu() + self.width * self.scale


class Grinqh(Measured):
    """More bits of the columns whose inputs are larger, equally many for every token."""

    name = "grinqh"
    summary = "reads 0 to 8 bits of columns, more where inputs are larger (from the abstract)"
    paper = "2606.23419"
    recorded: ClassVar = {"allocation": "uniform", "entries": "columns"}
    granularity = "bits of input channels"
    replaces = True
    entries_levels: LevelsText = option(
        "0-2-4-6-8", "bits in which a column may be read; the last number is a code's bits"
    )
    entries_group: int = option(128, "number of weights that share a scale; 0: a whole row", least=0)

    @functools.cached_property
    def levels(self) -> Levels:
        """Bits in which columns are read."""
        return Levels(self.entries_levels, self.entries_group)

    @property
    def fewest(self) -> float:
        """Bits of a weight, of codes, that a token reads at least."""
        return self.levels.bits[0]

    def first_look(self, room: float) -> float:
        """Return the bits of a weight that a token reads of all rows of gate and up. room: that the read leaves."""
        return room

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        super().check(ffns, sparsity, bits)
        self.refuse_codes(ffns, bits, f"{self.name} makes codes of 16-bit weights")
        for width in {n for f in ffns for n in (f.width, f.size)} if sparsity else ():
            least, most = ((b + self.levels.scale(width)) / OWN_BITS for b in (self.fewest, self.levels.bits[-1]))
            if not least <= 1 - sparsity <= most + TOLERANCE:
                raise UserError(
                    f"{self.name} reads {100 * least:.1f} to {100 * most:.1f} % of the bytes, not "
                    f"{100 * (1 - sparsity):.4g} %",
                    f"use a sparsity from {1 - most:.3f} to {math.floor(1000 * (1 - least)) / 1000:.3f}, or other "
                    "entries.levels",
                )

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        self.matrices: dict[nn.Module, list[Nested]] = {}
        if not sparsity:
            return
        self.matrices = {m: self._nested(f, m) for f in ffns for m in f.projections}
        sizes, sparse, levels = sum(f.size for f in ffns), 1 - sparsity, self.levels
        of_x = sum(f.size * (f.matrices - 1) * levels.read(sparse, f.width) for f in ffns)
        of_h = sum(f.size * levels.read(sparse, f.size) for f in ffns)
        self.fixed_read = (of_x + of_h) / (sizes * ffns[0].matrices)
        self._weights = sizes * ffns[0].matrices * ffns[0].width * OWN_BITS  # bits of all weights

    def _nested(self, ffn: FFN, module: nn.Module) -> list[Nested]:
        """Return the matrices of a projection, cached for the next session."""
        share, down, levels = 1 - self.sparsity, module is ffn.down, self.levels
        parts = 2 if ffn.fused and not down else 1

        def make() -> list[Nested]:
            weights, bias = plain_matrix(module).chunk(parts), bias_of(module)
            biases = [None] * parts if bias is None else bias.chunk(parts)
            room = OWN_BITS * share - levels.scale(weights[0].shape[1])
            room = room if down else self.first_look(room)
            return [Nested(levels, w, b, room) for w, b in zip(weights, biases, strict=True)]

        held = [parameter_of(module), *([] if (bias := bias_of(module)) is None else [bias])]
        return _CODES.get(module, held, (self.spec, share), make)  # no method: it would keep the model

    def forwards(self, session: Session) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        return {module: self._graded(session, module) for module in self.matrices}

    def _graded(self, session: Session, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what a projection computes in place of its product."""
        matrices = self.matrices[module]

        def forward(x: Tensor) -> Tensor:
            if session.phase != "decode":
                products = [matrix.whole(x) for matrix in matrices]
            else:
                products = [self.product(session, matrix, x) for matrix in matrices]
            return products[0] if len(products) == 1 else torch.cat(products, -1)

        return forward

    def product(self, session: Session, matrix: Nested, x: Tensor) -> Tensor:
        """Return a decoded token's product with a matrix, and count what it reads. x: [..., n]."""
        level = matrix.choose(x)
        self.count_bits(session, matrix.rows * matrix.row_bits(level))
        return matrix.product(x, level).to(x.dtype)

    def count_bits(self, session: Session, bits: Tensor) -> None:
        """Add to what the current tokens read. bits: [B, T] or [B * T] fp64."""
        self.count(bits.view(session.valid.shape) / self._weights)

    def fetched(self, read: float) -> float:
        """Matrices lie by columns, each from a line on, the first bits of all rows first; scales from end to end.

        Where a level is no whole lines, it is assumed to be as frequent as with normal inputs.
        """
        bits = 0.0
        for matrix in itertools.chain(*self.matrices.values()):
            x = torch.randn(16, matrix.width, generator=torch.Generator().manual_seed(0))
            bits += self.lines(matrix, x, matrix.choose(x)) + matrix.rows * matrix.width * matrix.scale
        return max(read, bits / self._weights)

    def lines(self, matrix: Nested, x: Tensor, level: Tensor) -> float:
        """Return the bits of the lines of columns that a token fetches: a mean. x: [T, n]; level: likewise, long."""
        return float(in_lines(torch.tensor(self.levels.bits) * matrix.rows)[level].sum(-1).double().mean())

    def computed(self, read: float) -> float:
        return 1.0  # fewer bits are no fewer products

    def nbytes(self) -> int:
        return sum(m.gains.nbytes for matrices in self.matrices.values() for m in matrices)

    def weight_bytes(self, fast: bool) -> int:
        total = 0
        for matrix in (m for matrices in self.matrices.values() for m in matrices):
            read = [v.dtype.itemsize * matrix.packed.codes.numel() for v in matrix.values if v is not None]
            # A kernel reads codes of its own; prompts read all bits, of values that are cached while there is room.
            of_kernel = kernel.matrix_bytes(matrix.rows, matrix.width, self.entries_group) if fast else 0
            total += nbytes(vars(matrix.packed)) + (read[-1] if fast else sum(read)) + of_kernel
        return total

    def step_flops(self, shape: ModelShape) -> float:
        steps = len(self.levels.bits) - 1  # a product for each step, and its place among the others
        return 2 * steps * (shape.layers * shape.width * (shape.ffn_matrices - 1) + sum(shape.ffn_sizes))

    # -- the kernel ------------------------------------------------------------------------------------------------

    def why_no_kernel(self, ffns: Sequence[FFN]) -> str | None:
        if self.levels.bits != [*kernel.LEVELS] or self.entries_group not in (0, kernel.GROUP):
            return "the kernel reads columns in 0, 2, 4, 6 or 8 bits, with scales of 128 weights or of a row"
        return next(filter(None, map(fast.why_not_whole, ffns)), None)

    def kernel(self, ffn: FFN) -> kernel.ColumnsFFN:
        gate, up, down = (self.matrices[m][0] for m in ffn.projections)

        def make() -> kernel.ColumnsFFN:
            parts = [kernel.ColumnsMatrix(m.packed, m.gains.tolist(), m.limit) for m in (gate, up, down)]
            return kernel.ColumnsFFN(parts, fast.act_of(ffn) or "")

        own = [parameter_of(m) for m in ffn.projections]
        return _KERNELS.get(ffn.up, own, (self.spec, gate.limit, down.limit), make)


class DecDEC(Grinqh):
    """3 bits of all columns, and 4 more of those with the largest inputs."""

    name = "decdec"
    summary = "reads 3 bits of all columns, and 4 more of those with the largest inputs"
    paper = "2412.20185"
    entries_levels: LevelsText = "3-7"
