"""Bits of served FFN weights, and the values of `--ffn-bits`. Does not import torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from dart_eval.util.errors import UserError

OWN_BITS = 16  # of a weight as models are served; a float32 checkpoint counts as a bfloat16 one
SCALE_BITS = 16
LAST_BITS = "last bits"  # left out of every weight by rounding
GROUP = 32
BLOCK = 256  # weights that share the factors of a K-quant


class KQuant(NamedTuple):
    """A format of llama.cpp: 6-bit scales (and minima) of groups, as multiples of 16-bit factors."""

    group: int
    group_bits: int
    factors: int


K_QUANTS = {3: KQuant(16, 6, 1), 4: KQuant(32, 12, 2), 5: KQuant(32, 12, 2)}  # by the bits of a code


class Rounding(NamedTuple):
    """How FFN weights are rounded.

    Attributes:
        bits: of a code, 2 to 8.
        group: weights that share a scale, neighbours in a row (the weights of one output); 0: a whole row.
        k: whether it is a K-quant of llama.cpp (`k_quants`), whose bits decide `group`.
    """

    bits: int
    group: int = GROUP
    k: bool = False

    @property
    def text(self) -> str:
        """The user's spelling: `4`, `4:64`, `4:row`, `q4_k`."""
        if self.k:
            return f"q{self.bits}_k"
        return f"{self.bits}" + ("" if self.group == GROUP else f":{self.group or 'row'}")

    def weight_bits(self, width: int) -> float:
        """Return the bits of a weight with its part of a scale, in rows of `width` weights."""
        return self.stored(width).total

    def stored(self, width: int) -> Stored:
        """Return the bits of a weight, of its code and of scales, in rows of `width` weights."""
        if self.k:
            of = K_QUANTS[self.bits]
            scales = -(-width // of.group) * of.group_bits + -(-width // BLOCK) * of.factors * SCALE_BITS
            return Stored(self.bits, scales / width)
        return Stored(self.bits, SCALE_BITS * -(-width // (self.group or width)) / width)


def parse(text: str) -> Rounding | None:
    """Parse `4`, `4:64`, `4:row` or `q4_k`; None for `16`, unrounded weights.

    Raises:
        UserError: it is none of these.
    """
    spelled = text.strip().lower()
    if spelled == str(OWN_BITS):
        return None
    if match := re.fullmatch("q([345])_k", spelled):
        return Rounding(bits := int(match[1]), K_QUANTS[bits].group, k=True)
    match = re.fullmatch("([2-8])(?::(row|[0-9]{1,9}))?", spelled)
    size = 0 if not match or match[2] == "row" else int(match[2] or GROUP)
    if not match or (match[2] != "row" and size < 2):
        raise UserError(
            f"--ffn-bits {text!r} is not understood",
            f"write 4, 4:64 (2 to 8 bits, and the weights that share a scale; {GROUP} if not given), 4:row, or q3_k, "
            f"q4_k, q5_k; {OWN_BITS} is unrounded",
        )
    return Rounding(int(match[1]), size)


# One for each number of bits, to stand beside methods that read as much.
RIVALS = [*filter(None, map(parse, ("8:128", "7:128", "6:128", "q5_k", "q4_k", "q3_k", "2")))]
NEAR = 0.02  # of a read


def rounding_at(read: float) -> Rounding | None:
    """Return the rounding under which dense reads about as much: the nearest within `NEAR`, or the largest below.

    Args:
        read: share of the FFN weight bytes, in rows that groups divide.
    """
    reads = {rounding.weight_bits(BLOCK) / OWN_BITS: rounding for rounding in RIVALS}
    near = sorted((abs(other - read), other) for other in reads if abs(other - read) <= NEAR)
    below = [other for other in reads if other < read]
    return reads[near[0][1]] if near else reads[max(below)] if below else None


def unread(sparsity: float, share: float) -> float:
    """Return the share of the bytes in the model's own dtype that is not read.

    Args:
        sparsity: share of the served weights that is not read.
        share: bytes of the served weights / bytes in the model's own dtype.
    """
    return sparsity if share == 1 else 1 - share * (1 - sparsity)


class Stored(NamedTuple):
    """Bits of a served weight.

    Attributes:
        code: of its own code.
        scale: its part of scales, offsets and the like, which several weights share.
        about: whether they are those of a checkpoint's configuration, which neglects some of the scales.
    """

    code: float
    scale: float = 0.0
    about: bool = False

    @property
    def total(self) -> float:
        """Bits in all."""
        return self.code + self.scale

    @staticmethod
    def of(total: float) -> Stored:
        """Split a total: a code has whole bits, and scales take 1 at most (GGUF's Q4_1)."""
        whole = int(total)
        code = whole if total != whole or whole in (8, OWN_BITS) else whole - 1
        return Stored(code, total - code)
