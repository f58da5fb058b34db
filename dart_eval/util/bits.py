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
GPTQ, IMATRIX = "gptq", "imatrix"  # what looks at a calibration text as weights are rounded
MATRICES = ("gate", "up", "down")  # that a mix tells apart


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
        by: what looks at a calibration text, `GPTQ` (whose groups also have a zero, of `bits` bits) or `IMATRIX`;
            empty: weights alone decide.
        parts: matrices (`MATRICES`) that are rounded otherwise, and how.
    """

    bits: int
    group: int = GROUP
    k: bool = False
    by: str = ""
    parts: tuple[tuple[str, Rounding], ...] = ()

    @property
    def text(self) -> str:
        """The user's spelling: `4`, `4:64`, `4:row`, `q4_k`, `q4_k+imatrix`, `gptq4:32+down5:128`."""
        if self.k:
            return f"q{self.bits}_k" + (f"+{self.by}" if self.by else "")
        if self.by:
            return "+".join(f"{name}{one.bits}:{one.group or 'row'}" for name, one in ((self.by, self), *self.parts))
        return f"{self.bits}" + ("" if self.group == GROUP else f":{self.group or 'row'}")

    @property
    def plain(self) -> bool:
        """Whether its text is a number of bits."""
        return not (self.k or self.by)

    def of(self, matrix: str) -> Rounding:
        """Return how one of `MATRICES` is rounded."""
        return dict(self.parts).get(matrix) or self._replace(parts=())

    def weight_bits(self, width: int) -> float:
        """Return the bits of a weight with its part of a scale, in rows of `width` weights."""
        return self.stored(width).total

    def stored(self, width: int) -> Stored:
        """Return the bits of a weight, of its code and of scales, in rows of `width` weights; none of `parts`."""
        if self.k:
            of = K_QUANTS[self.bits]
            scales = -(-width // of.group) * of.group_bits + -(-width // BLOCK) * of.factors * SCALE_BITS
            return Stored(self.bits, scales / width)
        shared = SCALE_BITS + (self.bits if self.by else 0)
        return Stored(self.bits, shared * -(-width // (self.group or width)) / width)


def parse(text: str) -> Rounding | None:
    """Parse `4`, `4:64`, `4:row`, `q4_k`, or what is calibrated (`Rounding.text`); None for `16`, unrounded weights.

    Raises:
        UserError: it is none of these.
    """
    spelled = text.strip().lower()
    if spelled == str(OWN_BITS):
        return None
    if match := re.fullmatch(rf"q([345])_k(?:\+({IMATRIX}))?", spelled):
        return Rounding(bits := int(match[1]), K_QUANTS[bits].group, k=True, by=match[2] or "")
    items = [re.fullmatch("([a-z]*)([2-8])(?::(row|[0-9]{1,9}))?", item) for item in spelled.split("+")]
    of = {m[1]: Rounding(int(m[2]), 0 if m[3] == "row" else int(m[3] or GROUP), by=GPTQ) for m in items if m}
    small = any(m and (m[3] or "row") != "row" and int(m[3]) < 2 for m in items)
    if small or len(of) < len(items) or not ({*of} == {""} or {GPTQ} <= {*of} <= {GPTQ, *MATRICES}):
        raise UserError(
            f"--ffn-bits {text!r} is not understood",
            f"write 4, 4:64 (2 to 8 bits, and the weights that share a scale; {GROUP} if not given), 4:row, or q3_k, "
            f"q4_k, q5_k; calibrated gptq4:32, gptq4:32+down5:128 (also gate, up) or q4_k+{IMATRIX}; {OWN_BITS} is "
            "unrounded",
        )
    if "" in of:
        return of[""]._replace(by="")
    parts = ((name, of[name]) for name in MATRICES if of.get(name, of[GPTQ]) != of[GPTQ])
    return of[GPTQ]._replace(parts=tuple(parts))


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
