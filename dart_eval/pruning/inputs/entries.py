"""Entries: which weights inside the matrices a token reads, where that is no matter of whole neurons.

A part here leaves out columns of a matrix, by the inputs of a token, or single weights, for all tokens alike. Its rows
are another granularity than neurons: a kernel must gather columns or skip single weights. `rounded` leaves out the last
bits of every weight.
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
    """What is known of the n inputs of a matrix before any prompt.

    Attributes:
        count: how many of them a token is to read, or each output.
        threshold: the number that so many of their magnitudes are above on the calibration text; None without one.
        norms: [n] fp32, of the columns of the matrix, where the part weighs by them.
        sizes: [n] fp32, root of the sum of squares of each input over the calibration text; None without one.
    """

    count: int
    threshold: float | None = None
    norms: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Entries(Part):
    """Base of all of them.

    Attributes:
        granularity: of what is left out.
        by_token: whether each token reads columns of its own; else single weights are 0 for all of them.
        sized: whether the sparsity decides how many are left out.
    """

    slot = "entries"
    granularity: ClassVar[str]
    fits_experts = False
    fits_norms = False
    fits_repeats = False
    by_token: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    def check_bits(self, bits: Stored) -> None:
        """Refuse weights that it is not made for. bits: of a weight as it is served.

        Raises:
            UserError: with the reason.
        """

    def weighs(self, matrix: int) -> bool:
        """Whether it needs the norms of the columns of a matrix. matrix: 0 is gate (or the up of a plain FFN)."""
        return False

    def bytes_read(self, densities: float, bits: Stored, weight: Tensor) -> float:
        """Bytes that a token reads of a matrix / all of it.

        Args:
            densities: share of its columns, or of the weights of its rows, that the sparsity leaves.
            bits: of a weight as it is served.
            weight: [out, n], the matrix.
        """
        return self.share(densities, bits)

    def share(self, some: Share, bits: Stored) -> Share:
        """Bytes of so large a share of the weights / all: each scale stands for weights of several columns."""
        return (some * bits.code + bits.scale) / bits.total

    def kept(self, x: Tensor, inputs: Inputs) -> Tensor:
        """[..., n] bool, the columns that each token reads. x: [..., n], the inputs of the matrix."""
        raise NotImplementedError

    def weight_mask(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """[out, n] bool, the weights that are read, by whatever token. weight: [out, n]."""
        raise NotImplementedError

    def as_read(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """[out, n], what tokens read of a matrix, where it is the same for all of them. weight: [out, n]."""
        return weight * self.weight_mask(weight, inputs)
