"""Images: what a token reads of gate and up before it chooses, coarser and cheaper than the weights themselves.

An image is a copy of its own beside the model (`copy`, `low-rank`), or a part of the served weights (`plane`): of a row
that is then chosen only the rest has to be read, and nothing is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dart_eval.bits import OWN_BITS, Rounding
from dart_eval.pruning.parts.base import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.bits import Stored
    from dart_eval.rounding import Served


CODE_BITS = 3  # of an exponent's code; a plane of more bits has the first ones of the mantissa


@dataclass(frozen=True, kw_only=True)
class Image(Part):
    """Base of all images of a matrix [F, D], whose rows are those of neurons.

    Attributes:
        stored: it is kept beside the model.
        exact: it leaves nothing out.
    """

    slot = "image"
    stored: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        """Bits of the image for each weight of the matrix.

        Args:
            served: bits of a weight. rows, width: of the matrix.
        """
        raise NotImplementedError

    def read(self, served: Stored, rows: int, width: int, thin: float) -> float:
        """Bits of the image that are read for each weight of the matrix. thin: share of the columns that are read."""
        return self.bits_of(served, rows, width) if thin == 1 else self._read(served, rows, width, columns(width, thin))

    def _read(self, served: Stored, rows: int, width: int, columns: int) -> float:
        """The same where so many columns are read, and no others."""
        return self.bits_of(served, rows, width) * columns / width

    def unseen(self, served: Stored, rows: int, width: int, thin: float) -> float:
        """Bits of each weight of a chosen row that belong to an image which is no copy, and were not read with it."""
        return 0.0 if self.stored else self.bits_of(served, rows, width) - self.read(served, rows, width, thin)

    def left(self, matrix: Served, precision: int = 0) -> float:
        """Bits that are still to be read of each weight of a row that was chosen.

        Args:
            precision: bits of a weight that are read at most, where it is kept in planes; 0: all.
        """
        return matrix.bits

    def column(self, matrix: Served, precision: int = 0) -> float:
        """Bits that are read of each weight of a column of down. Arguments as of `left`; `matrix` is down."""
        return matrix.stored.code

    def coarse(self, served: Stored, rows: int, width: int) -> float:
        """Bits that are read of each weight of a column of the image of down. Arguments as of `bits_of`."""
        return self.bits_of(served, rows, width)

    def across(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        """Bits for each weight of down that are read whichever of its columns are: scales stand for parts of rows.

        Args:
            graded: columns of the image are read, too. The others as of `bits_of`.
        """
        return served.scale

    def mantissa(self, precision: int) -> int | None:
        """Bits of the mantissa of a 16-bit weight that are read at that precision; None: all."""
        return None

    def values(self, matrix: Served) -> Tensor:
        """[F, D] fp32, what the image says the weights are."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Weights(Image):
    """The weights themselves: gate and up are read whole, and only down is chosen."""

    name = "weights"
    summary = "is the weights themselves: gate and up are read whole"
    exact = True

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return served.total

    def _read(self, served: Stored, rows: int, width: int, columns: int) -> float:
        return served.total - served.code * (1 - columns / width)  # every scale is needed

    def left(self, matrix: Served, precision: int = 0) -> float:
        return 0.0

    def coarse(self, served: Stored, rows: int, width: int) -> float:
        return served.code

    def values(self, matrix: Served) -> Tensor:
        return matrix.weight.float()


@dataclass(frozen=True, kw_only=True)
class Copy(Image):
    """A copy that is rounded to few bits, as Prox (arXiv 2607.27591) keeps one of 4 bits."""

    name = "copy"
    summary = "is a copy beside the model, rounded to few bits"
    stored = True
    bits: int = option(4, "bits of a weight", least=2, most=8)
    group: int = option(32, "weights that share a scale; 0: a row", least=0)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return Rounding(self.bits, self.group).weight_bits(width)

    def _read(self, served: Stored, rows: int, width: int, columns: int) -> float:
        return self.bits_of(served, rows, width) - self.bits * (1 - columns / width)  # every group's scale is needed

    def coarse(self, served: Stored, rows: int, width: int) -> float:
        return self.bits

    def across(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        return served.scale + (self.bits_of(served, rows, width) - self.bits) * graded

    def values(self, matrix: Served) -> Tensor:
        from dart_eval.rounding import rounded

        return rounded(matrix.weight, Rounding(self.bits, self.group)).values


@dataclass(frozen=True, kw_only=True)
class LowRank(Image):
    """The best approximation of a low rank, by singular values."""

    name = "low-rank"
    summary = "is a copy of low rank beside the model"
    stored = True
    rank: int = option(64, "rank of the approximation", least=1)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        return OWN_BITS * min(self.rank, rows, width) * (rows + width) / (rows * width)

    def _read(self, served: Stored, rows: int, width: int, columns: int) -> float:
        return OWN_BITS * min(self.rank, rows, width) * (rows + columns) / (rows * width)

    def coarse(self, served: Stored, rows: int, width: int) -> float:
        return OWN_BITS * min(self.rank, rows, width) / rows

    def across(self, served: Stored, rows: int, width: int, graded: bool) -> float:
        return served.scale + OWN_BITS * min(self.rank, rows, width) / width * graded

    def values(self, matrix: Served) -> Tensor:
        import torch

        u, s, v = torch.linalg.svd(matrix.weight.float(), full_matrices=False)
        return (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]


@dataclass(frozen=True, kw_only=True)
class Plane(Image):
    """The top bits of the served weights, read as a plane of their own.

    Of 16-bit weights: the sign, a short code of the exponent, counted down from the row's largest, and perhaps the
    first bits of the mantissa; the last code stands for all smaller exponents, which are then kept with the rest of
    the mantissas (`planes`). Of weights that `--ffn-bits` rounds, and of quantised checkpoints whose weights are codes
    on an even grid (GGUF, GPTQ, AWQ, torchao, compressed-tensors): the high bits of the codes. This project's own.
    """

    name = "plane"
    summary = "is the top bits of the served weights: nothing is stored twice, and a chosen row reads only its rest"
    bits: int = option(0, "bits of a weight in it; 0: 5 of a 16-bit weight, half of those of a code", least=0, most=7)

    def top(self, code_bits: float) -> int:
        """Bits of the plane. code_bits: of a weight without scales."""
        return self.bits or (5 if code_bits >= 9 else int(code_bits + 1) // 2)

    def bits_of(self, served: Stored, rows: int, width: int) -> float:
        if served.code == OWN_BITS:
            return self.top(OWN_BITS) + 8 / width  # the row's largest exponent
        return min(self.top(served.code), served.code) + served.scale

    def _read(self, served: Stored, rows: int, width: int, columns: int) -> float:
        bits = min(self.top(served.code), served.code)
        return self.bits_of(served, rows, width) - bits * (1 - columns / width)  # every scale and exponent is needed

    def left(self, matrix: Served, precision: int = 0) -> float:
        if matrix.packed is None:
            return self._beyond(matrix, precision)
        code_bits = matrix.packed.rounding.bits  # all are read, whatever the precision
        return max(0, code_bits - self.top(code_bits))

    def column(self, matrix: Served, precision: int = 0) -> float:
        if matrix.packed is None:  # down is in planes where they save bytes
            return self.top(matrix.bits) + self._beyond(matrix, precision) if precision else matrix.stored.code
        return matrix.packed.rounding.bits

    def coarse(self, served: Stored, rows: int, width: int) -> float:
        # Of the largest exponents of down's rows, a byte for all neurons, the share of the columns is counted.
        return self.bits_of(served, rows, width) - served.scale

    def _beyond(self, matrix: Served, precision: int) -> float:
        """Bits of a 16-bit weight outside the plane: escaped exponents, and mantissa up to the precision."""
        from dart_eval.pruning.planes import MANTISSA, escapes

        code_bits, shown = self.parts()
        kept = self.mantissa(precision)
        return max(0, (MANTISSA if kept is None else kept) - shown) + escapes(matrix.weight, code_bits)

    def mantissa(self, precision: int) -> int | None:
        code_bits, shown = self.parts()
        kept = max(shown, precision - 1 - code_bits)
        return None if not precision or kept >= 7 else kept

    def parts(self) -> tuple[int, int]:
        """Bits of the exponent's code and of the mantissa in the plane of a 16-bit weight, beside the sign."""
        rest = self.top(OWN_BITS) - 1
        return min(rest, CODE_BITS), max(0, rest - CODE_BITS)

    def values(self, matrix: Served) -> Tensor:
        from dart_eval.pruning.planes import exponents, high_bits

        if matrix.packed is None:
            return exponents(matrix.weight, *self.parts())
        return high_bits(matrix.packed, self.top(matrix.packed.rounding.bits))


def columns(width: int, thin: float) -> int:
    """How many entries of x a preview goes by, at least one."""
    return max(1, int(thin * width + 1e-9))


IMAGES = (Plane, Copy, LowRank, Weights)
