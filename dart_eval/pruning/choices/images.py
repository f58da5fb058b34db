"""Images: coarse, cheap versions of gate and up that a token reads before it chooses.

An image is a copy beside the model (`copy`, `low-rank`) or a part of the served weights (`first-bits`). With the latter
a chosen row needs only its remaining bits, and nothing is stored twice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from dart_eval.pruning.part import Part, option
from dart_eval.util.bits import OWN_BITS, Rounding
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dart_eval.util.bits import Stored
    from dart_eval.weights.rounding import Served


class Columns(NamedTuple):
    """Shares of the columns of gate and up that a preview reads: in all of its bits, and in one bit fewer."""

    fine: float = 1.0
    rough: float = 0.0


class Level(NamedTuple):
    """The codes of 16-bit weights and their preview, for a range of the share of bytes read.

    Attributes:
        least: lower bound of the share of bytes read.
        code: bits of a code.
        bits: first bits of a code that a preview reads.
        columns: shares of the columns of gate and up.
    """

    least: float
    code: int
    bits: int
    columns: Columns


LEVELS = (
    Level(0.36, 8, 4, Columns()),
    Level(0.25, 6, 4, Columns()),
    Level(0.19, 6, 3, Columns()),
    Level(0.13, 5, 3, Columns(0.2, 0.6)),
    Level(0.0, 4, 3, Columns(0.2, 0.3)),
)


def level_of(read: float) -> Level:
    """Return the level for a share of bytes read. results/setting.md shows how the levels were chosen."""
    return next(level for level in LEVELS if read + 1e-9 >= level.least)  # 1 - 0.81 is a little less than 0.19


@dataclass(frozen=True, kw_only=True)
class Image(Part):
    """Base of all images of a matrix [F, D] with a row per neuron.

    Attributes:
        stored: whether it is stored beside the model.
        exact: whether it equals the weights.
        served: rounding of 16-bit weights while it is in use; None: no rounding.
    """

    slot = "image"
    stored: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    served: ClassVar[Rounding | None] = None

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        """Return the bits of the image per weight of a matrix [rows, width]. served: bits of a weight."""
        raise NotImplementedError

    def bits_read(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        """Return the bits of the image that are read per weight. Scales of several weights are always read."""
        return self.bits_of(served, rows, width) * columns.fine

    def remaining_bits(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        """Return the bits left to read per weight of a chosen row. Arguments as of `bits_read`."""
        return served.total - (0.0 if self.stored else self.bits_read(served, rows, width, columns))

    def down_bits(self, served: Stored, rows: int, width: int) -> float:
        """Return the bits read per weight of a column of the image of down. Arguments as of `bits_of`."""
        return self.bits_of(served, rows, width)

    def shared_bits(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        """Return the bits per weight of down that any choice of columns reads, since scales span parts of rows.

        Args:
            graded: whether columns of the image are read, too. The others as of `bits_of`.
        """
        return served.scale

    def approximate(self, matrix: Served, fewer: int = 0) -> Tensor:
        """Return [F, D] fp32, the weights according to the image.

        Args:
            fewer: bits fewer of each weight, if the image is made of bits.
        """
        raise NotImplementedError

    def decoded(self, matrix: Served, fewer: int = 0) -> Callable[[], Tensor]:
        """Return a function that gives the same in the dtype of the weights, called by every forward."""
        approximate = self.approximate(matrix, fewer).to(matrix.weight.dtype)
        return lambda: approximate


@dataclass(frozen=True, kw_only=True)
class Weights(Image):
    """The weights themselves: gate and up are read in full, and only down is chosen."""

    name = "weights"
    summary = "reads the weights themselves: all of gate and up"
    exact = True

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return served.total

    def bits_read(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        return served.scale + served.code * columns.fine

    def down_bits(self, served: Stored, rows: int, width: int) -> float:
        return served.code

    def approximate(self, matrix: Served, fewer: int = 0) -> Tensor:
        return matrix.weight.float()


@dataclass(frozen=True, kw_only=True)
class Copy(Image):
    """A copy that is rounded to few bits, as Prox (arXiv 2607.27591) keeps one of 4 bits."""

    name = "copy"
    summary = "reads a copy of the weights that is rounded to few bits"
    stored = True
    bits: int = option(4, "bits per weight", least=2, most=8)
    group: int = option(32, "number of weights that share a scale; 0: a whole row", least=0)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return Rounding(self.bits, self.group).weight_bits(width)

    def bits_read(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        return self.bits_of(served, rows, width) - self.bits * (1 - columns.fine)

    def down_bits(self, served: Stored, rows: int, width: int) -> float:
        return self.bits

    def shared_bits(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        return served.scale + (self.bits_of(served, rows, width) - self.bits) * graded

    def approximate(self, matrix: Served, fewer: int = 0) -> Tensor:
        from dart_eval.weights.rounding import rounded

        return rounded(matrix.weight, Rounding(self.bits, self.group)).values


@dataclass(frozen=True, kw_only=True)
class LowRank(Image):
    """The best approximation of a low rank, by singular values."""

    name = "low-rank"
    summary = "reads a low-rank copy of the weights"
    fits_experts = False
    stored = True
    rank: int = option(64, "rank of the approximation", least=1)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return self.bits_read(served, rows, width, Columns())

    def bits_read(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        return OWN_BITS * min(self.rank, rows, width) * (rows + columns.fine * width) / (rows * width)

    def down_bits(self, served: Stored, rows: int, width: int) -> float:
        return OWN_BITS * min(self.rank, rows, width) / rows

    def shared_bits(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        return served.scale + OWN_BITS * min(self.rank, rows, width) / width * graded

    def approximate(self, matrix: Served, fewer: int = 0) -> Tensor:
        import torch

        u, s, v = torch.linalg.svd(matrix.weight.float(), full_matrices=False)
        return (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]


@dataclass(frozen=True, kw_only=True)
class FirstBits(Image):
    """The first bits of the integer codes of FFN weights: nothing is stored twice.

    A session serves 16-bit weights as codes, to prompts too (`serving`). Weights rounded by `--ffn-bits`, and those of
    checkpoints on an even grid (GGUF, GPTQ, AWQ, torchao, compressed-tensors), are codes already. Four first bits
    stand for a line through the matrix's codes, by least squares; fewer for the mean of the codes that begin so. This
    project's own.
    """

    name = "first-bits"
    summary = "reads the first bits of the weights' codes: nothing is stored twice"
    code: int = option(0, "bits of the codes of 16-bit weights; 0: set by the read", least=0, most=8)
    group: int = option(128, "number of 16-bit weights that share a scale; 0: a whole row", least=0)
    bits: int = option(0, "first bits of a code that a preview reads; 0: half of its bits", least=0, most=7)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code == 1:
            raise UserError("image.code is 1", "whole numbers have 2 to 8 bits")

    @property
    def served(self) -> Rounding | None:  # type: ignore[override]
        return Rounding(self.code, self.group) if self.code else None

    def at(self, level: Level) -> FirstBits:
        """Return the image with the settings of a level."""
        return self if self.code else dataclasses.replace(self, code=level.code, bits=self.bits or level.bits)

    def first(self, code_bits: float) -> float:
        """Return the bits that a preview reads of a code with `code_bits` bits."""
        return min(self.bits or int(code_bits + 1) // 2, code_bits)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return self.first(served.code) + served.scale

    def bits_read(self, served: Stored, rows: int, width: int, columns: Columns) -> float:
        first = self.first(served.code)
        return served.scale + first * columns.fine + (first - 1) * columns.rough

    def down_bits(self, served: Stored, rows: int, width: int) -> float:
        return self.first(served.code)  # scales stand for several columns: `shared_bits`

    def approximate(self, matrix: Served, fewer: int = 0) -> Tensor:
        import torch

        if matrix.packed is None:  # at sparsity 0
            return matrix.weight.float()
        return matrix.packed.decoded(torch.float32, int(self.first(matrix.packed.rounding.bits)) - fewer)

    def decoded(self, matrix: Served, fewer: int = 0) -> Callable[[], Tensor]:
        from dart_eval.pruning.choices.serving import Decoded

        if matrix.packed is None:
            return super().decoded(matrix)
        first = int(self.first(matrix.packed.rounding.bits)) - fewer
        return Decoded(matrix.packed, matrix.weight.dtype, first)


IMAGES = (FirstBits, Copy, LowRank, Weights)
