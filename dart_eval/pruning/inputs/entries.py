"""Entries: the weights inside the matrices that a token reads, at another granularity than neurons.

A part leaves out columns of a matrix, by the inputs of a token, which a kernel must gather. `rounded` leaves out the
last bits of every weight, `columns` of some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from dart_eval.pruning.part import Part

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.util.bits import Stored

Share = TypeVar("Share", float, "Tensor")


@dataclass(frozen=True)
class Inputs:
    """Statistics of the n inputs of a matrix, before any prompt.

    Attributes:
        count: inputs that a token is to read.
        threshold: the number that `count` magnitudes exceed on the calibration text; None without one.
        norms: [n] fp32, norms of the matrix's columns, if the part uses them.
    """

    count: int
    threshold: float | None = None
    norms: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Entries(Part):
    """Base of all parts of the slot `entries`.

    Attributes:
        granularity: the unit that is left out.
        by_token: whether each token reads columns of its own.
        sized: whether the sparsity sets how much is left out.
        in_bits: whether it sets bits of weights, and not a number of columns.
    """

    slot = "entries"
    granularity: ClassVar[str]
    fits_experts = False
    fits_norms = False
    fits_repeats = False
    by_token: ClassVar[bool] = False
    sized: ClassVar[bool] = True
    in_bits: ClassVar[bool] = False

    def check_read(self, share: float, rows: int, width: int) -> None:
        """Refuse a read that it cannot meet. share: of the bytes of a matrix [rows, width].

        Raises:
            UserError: with what it can meet.
        """

    def weighs(self, matrix: int) -> bool:
        """Whether it needs the norms of a matrix's columns. matrix: 0 is gate (or the up of a plain FFN)."""
        return False

    def bytes_read(self, density: float, bits: Stored, rows: int, width: int) -> float:
        """Return the bytes that a token reads of a matrix / all its bytes.

        Args:
            density: share that the sparsity leaves: of its columns, or of its bits.
            bits: bits of a served weight.
            rows: outputs of the matrix.
            width: its inputs.
        """
        return self.share(density, bits)

    def share(self, some: Share, bits: Stored) -> Share:
        """Return the bytes of a share of the weights / all. Scales are always read, as they span several columns."""
        return (some * bits.code + bits.scale) / bits.total

    def columns_read(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Return [..., n] bool, the columns that each token reads. x: [..., n], the inputs of the matrix."""
        raise NotImplementedError
