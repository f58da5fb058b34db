"""How many bits an FFN weight is served with: what `--ffn-bits` may be. Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from dart_eval.util.errors import UserError

OWN_BITS = 16  # of a weight as models are served; a float32 checkpoint counts as the bfloat16 one that it would be
SCALE_BITS = 16
LAST_BITS = "last bits"  # what is left out of every weight where the first bits alone are read: rounding
GROUP = 32
LEAST, MOST = 2, 8
TYPED = re.compile(r"([0-9]{1,9})(?::(row|[0-9]{1,9}))?")
BLOCK = 256  # weights that share the factors of a K-quant


class KQuant(NamedTuple):
    """A format of llama.cpp: scales of 6 bits (and minima) of groups, as multiples of factors of 16 bits."""

    group: int
    group_bits: int
    factors: int


K_QUANTS = {3: KQuant(16, 6, 1), 4: KQuant(32, 12, 2), 5: KQuant(32, 12, 2)}  # by the bits of a code


@dataclass(frozen=True)
class Rounding:
    """How FFN weights are rounded.

    Attributes:
        bits: of a code, 2 to 8.
        group: weights that share a scale, neighbours in a row (what one output is made of); 0: a whole row.
        k: as a K-quant of llama.cpp (`k_quants`), of which `group` follows from the bits.
    """

    bits: int
    group: int = GROUP
    k: bool = False

    @property
    def text(self) -> str:
        """As a user types it: `4`, `4:64`, `4:row`, `q4_k`."""
        if self.k:
            return f"q{self.bits}_k"
        return f"{self.bits}" + ("" if self.group == GROUP else f":{self.group or 'row'}")

    def weight_bits(self, width: int) -> float:
        """Bits of a weight with its part of a scale, in rows of `width` weights."""
        return self.stored(width).total

    def stored(self, width: int) -> Stored:
        """The same, told apart."""
        if self.k:
            of = K_QUANTS[self.bits]
            scales = -(-width // of.group) * of.group_bits + -(-width // BLOCK) * of.factors * SCALE_BITS
            return Stored(self.bits, scales / width)
        return Stored(self.bits, SCALE_BITS * -(-width // (self.group or width)) / width)


def said(text: str) -> str:
    """What weights are rounded to, for people: `4 bits`, `q4_k`. text: as a user types it."""
    return text if text.startswith("q") else f"{text} bits"


def parse(text: str) -> Rounding | None:
    """`4`, `4:64`, `4:row` or `q4_k`; None for `16`, the weights as they are.

    Raises:
        UserError: it is none of these.
    """
    if found := re.fullmatch(r"q([0-9])_k", text.strip().lower()):
        if (of := K_QUANTS.get(int(found[1]))) is None:
            raise UserError(f"--ffn-bits is {text!r}", f"write {', '.join(f'q{b}_k' for b in K_QUANTS)}")
        return Rounding(int(found[1]), of.group, k=True)
    if text.strip() == str(OWN_BITS):
        return None
    remedy = f"write 4, 4:64 (weights that share a scale; {GROUP} if not given), 4:row or q4_k; {OWN_BITS} is unrounded"
    found = TYPED.fullmatch(text.strip())
    bits, group = found.groups() if found else ("", None)
    size = 0 if group == "row" else int(group or GROUP)
    if not found or (group != "row" and size < 2):
        raise UserError(f"--ffn-bits is {text!r}", remedy)
    if not LEAST <= int(bits) <= MOST:
        raise UserError(f"--ffn-bits is {text!r}: weights are rounded to {LEAST} to {MOST} bits", remedy)
    return Rounding(int(bits), size)


def unread(sparsity: float, share: float) -> float:
    """Share of the bytes of the model's own dtype that is not read, where this much of the served weights is not.

    Args:
        sparsity: share of the served weights that is not read.
        share: bytes of the served weights / those of the model's own dtype.
    """
    return sparsity if share == 1 else 1 - share * (1 - sparsity)


@dataclass(frozen=True)
class Stored:
    """Bits of a weight as it is served.

    Attributes:
        code: of its own. scale: its part of scales, offsets and the like, each of which stands for several weights.
    """

    code: float
    scale: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.code + self.scale

    @staticmethod
    def of(total: float) -> Stored:
        """The same where the sum alone is known: a code has whole bits, and scales take 1 at most (GGUF's Q4_1)."""
        whole = int(total)
        code = whole if total != whole or whole in (8, OWN_BITS) else whole - 1
        return Stored(code, total - code)
