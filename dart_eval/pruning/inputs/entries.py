"""Entries: the weights inside the matrices that a token reads, at another granularity than neurons.

A part leaves out columns of a matrix, by the inputs of a token, or single weights, for all tokens alike. A kernel must
gather columns or skip single weights. `rounded` leaves out the last bits of every weight, `Graded` of some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from dart_eval.pruning.inputs.levels import TOLERANCE, Levels
from dart_eval.pruning.part import Part
from dart_eval.util.bits import OWN_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dart_eval.util.bits import Stored
    from dart_eval.weights.codes import Packed

Share = TypeVar("Share", float, "Tensor")


@dataclass(frozen=True)
class Inputs:
    """Statistics of the n inputs of a matrix, before any prompt.

    Attributes:
        count: inputs that a token, or each output, is to read.
        threshold: the number that `count` magnitudes exceed on the calibration text; None without one.
        norms: [n] fp32, norms of the matrix's columns, if the part uses them.
        sizes: [n] fp32, root of the sum of squares of each input over the calibration text; None without one.
    """

    count: int
    threshold: float | None = None
    norms: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Entries(Part):
    """Base of all parts of the slot `entries`.

    Attributes:
        granularity: the unit that is left out.
        by_token: whether each token reads columns of its own; else single weights are 0 for all tokens.
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
            density: share that the sparsity leaves: of its columns, of the weights of its rows, or of its bits.
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

    def as_read(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """Return [out, n], the matrix that every token reads. weight: [out, n]."""
        raise NotImplementedError


class Coded:
    """A matrix that tokens read in several levels of bits.

    Attributes:
        rows, width: its outputs, and n, its inputs.
        room: bits of a weight that the read leaves for codes, on average.
        values: of each level's first bits, [out, n]; None for 0 bits.
        gains: what each step to the next level saves for a bit (`Levels.gains`); none of a part that does not rank.
    """

    rows: int
    width: int
    room: float
    values: Sequence[Callable[[], Tensor] | None]
    gains: Tensor


@dataclass(frozen=True, kw_only=True)
class Graded(Levels, Entries):
    """Base of the parts that read codes of 16-bit weights in several levels of bits. Attention is dense.

    Attributes:
        replaces: whether codes replace the weights: prompts read all their bits, and what first bits stand for is what
            a kernel multiplies. If not, prompts read the weights as they are.
        copied: bits of a weight, of codes, in a copy of gate and up beside the codes; 0: there is none.
    """

    by_token = True
    in_bits = True
    replaces: ClassVar[bool] = False
    copied: ClassVar[float] = 0

    def at(self, room: float) -> Graded:
        """Return the part with the levels that depend on the read. room: bits of a weight, without its scale."""
        return self

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

    def bytes_read(self, density: float, bits: Stored, rows: int, width: int) -> float:
        return density

    def fit(self, weight: Tensor, packed: Packed) -> Tensor:
        """Return the gains of a matrix (see `Coded`). weight: [out, n]. packed: its codes."""
        return weight.new_empty(0)

    def limit(self, matrix: Coded, sizes: Tensor | None) -> float:
        """Return what the read allows, in the unit of the part: bits, say. sizes: see `size`, of the text's tokens."""
        raise NotImplementedError

    def size(self, x: Tensor, matrix: Coded) -> Tensor:
        """Return [...], what is compared with a limit, if the part calibrates. x: [..., n], the inputs."""
        raise NotImplementedError

    def level(self, x: Tensor, matrix: Coded, limit: float, position: Tensor | None) -> Tensor:
        """Return [..., n] long, the level of each column, counted from 0.

        Args:
            x: [..., n], the inputs.
            position: [...] long, decoded tokens before each, if the part counts them.
        """
        raise NotImplementedError
