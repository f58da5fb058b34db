"""Columns in graded bits: a token reads more bits of the columns whose inputs are larger, after GRINQH and DecDEC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.inputs.entries import Entries
from dart_eval.pruning.inputs.levels import TOLERANCE, Levels
from dart_eval.pruning.part import option
from dart_eval.util.bits import OWN_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.util.bits import Stored
    from dart_eval.weights.codes import Packed


@dataclass(frozen=True, kw_only=True)
class GradedColumns(Levels, Entries):
    """A token reads the first b_i bits of column i of a matrix: more bits where |x_i| is larger.

    The bits b_i, each one of `levels`, make the expected squared error of the product small within the bits that the
    read allows:

        sum_i x_i^2 E(b_i),   E(b) = ||W - W(b)||^2 / n,   sum_i b_i <= bits

    Steps from level to level are taken in the order of the error that they save for a bit, by the convex hull of E,
    until the next step no longer fits. No other choice of as many bits has less error where E is convex. All tokens
    read the same number of bits, or one step less. Of down, the inputs are the neurons' h. An E of each column by
    itself would have to be read by every token, and saves less than it costs (results/columns.md).

    GRINQH (arXiv 2606.23419, its abstract) reads 0 to 8 bits of nested codes by thresholds on |x_i|. DecDEC
    (2412.20185; SNU-ARC/DecDEC at 7a3323f) reads 3-bit weights, and 4-bit residuals of the columns with the largest
    |x_i|: its levels are 3-7, where its base is rounded by itself. TEAL's levels are 0 and all bits. Prompts read all
    bits of the codes, so that codes can replace the weights. With the levels 0-2-4-6-8 a kernel for CPUs reads the
    chosen bits alone (`kernels.cpu.columns`).
    """

    name = "columns"
    summary = "reads more bits of the columns whose inputs are larger, equally many for every token"
    granularity = "bits of input channels"
    by_token = True
    in_bits = True
    levels: Literal[
        "0-2-3-4-5-6-8", "0-1-2-3-4-5-6-7-8", "0-2-3-4-5-6", "0-2-4-6-8", "0-2-4-8", "0-4-8", "0-8", "2-4-8", "3-7",
        "4-8", "8",
    ] = option("0-2-4-6-8", "bits in which a column may be read; the last number is a code's bits")  # fmt: skip
    group: int = option(128, "number of weights that share a scale; 0: a whole row", least=0)

    def lacking(self, ffn: FFN) -> str | None:
        from dart_eval.kernels.cpu import blocks, columns

        if self.bits != [*columns.LEVELS] or self.group not in (0, columns.GROUP):
            return "the kernel reads columns in 0, 2, 4, 6 or 8 bits, with scales of 128 weights or of a row"
        return blocks.lacking(ffn)

    def first_look(self, room: float) -> float:
        """Return the bits of a weight that a token reads of all rows of gate and up. room: that the read leaves."""
        return room

    @property
    def fewest(self) -> float:
        """Bits of a weight, of codes, that a token reads at least."""
        return self.bits[0]

    def check_read(self, share: float, rows: int, width: int) -> None:
        least, most = ((bits + self.scale(width)) / OWN_BITS for bits in (self.fewest, self.bits[-1]))
        if share < least or share > most + TOLERANCE:
            raise self.out_of_reach(least, most, share)

    def fit(self, weight: Tensor, packed: Packed) -> Tensor:
        """Return what each step of a matrix to the next level saves for a bit. weight: [out, n]. packed: its codes."""
        import torch

        read = (packed.decoded(torch.float32, bits) if bits else 0.0 for bits in self.bits)
        errors = torch.stack([(weight.float() - values).square().sum(0).mean() for values in read])
        return self.gains(errors)

    def limit(self, width: int, room: float) -> int:
        """Return the bits of codes that a token may read of a row. room: bits of a weight, without its scale."""
        return min(int(width * room + 1e-9), self.bits[-1] * width)

    def bytes_read(self, density: float, bits: Stored, rows: int, width: int) -> float:
        read = self.limit(width, OWN_BITS * density - self.scale(width))
        if self.step:  # of other levels a token may find no step that fits the last bits
            read -= (read - self.bits[0] * width) % self.step
        return (read / width + self.scale(width)) / OWN_BITS

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        steps = len(self.bits) - 1  # a product for each step, and its place among the others
        return 2 * steps * (shape.layers * shape.width * (shape.ffn_matrices - 1) + mask)
