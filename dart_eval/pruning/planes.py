"""Weights in two planes: a coarse one that every token reads, and a rest that is read of chosen rows alone.

bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. The exponents of a row lie close together: a code of a few
bits says how far one is below the row's largest. The last code is an escape: the exponent is smaller still (or the
weight is 0), and stands in full with the rest. So the split loses nothing. The first plane is a logarithmic image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.codes import Packed

MANTISSA, EXPONENT = 7, 8  # bits of a bfloat16
DRAWN = 64  # rows that stand for those of a matrix without numbers


@dataclass(frozen=True)
class Planes:
    """A matrix of bfloat16 in two planes.

    Attributes:
        signs: [F, D] bool. codes: [F, D] uint8, the row's largest exponent less the weight's, at most `escape`.
        largest: [F] int16, the largest exponent of each row.
        mantissas: [F, D] uint8.
        escaped: [n] uint8, the exponents of weights with the code `escape`, in the order of rows and columns.
        code_bits: of a code; the escape is the largest code.
    """

    signs: Tensor
    codes: Tensor
    largest: Tensor
    mantissas: Tensor
    escaped: Tensor
    code_bits: int

    @property
    def escape(self) -> int:
        """The code of an exponent that stands with the rest."""
        return 2**self.code_bits - 1


def split(weight: Tensor, code_bits: int) -> Planes:
    """The two planes of a matrix [F, D] bfloat16; `join` undoes it, to the bit."""
    bits = weight.contiguous().view(torch.int16).to(torch.int32)
    exponent = (bits >> MANTISSA) & 0xFF
    largest = exponent.amax(1)
    escape = 2**code_bits - 1
    codes = (largest[:, None] - exponent).clamp_max(escape)
    return Planes(
        bits < 0, codes.to(torch.uint8), largest.to(torch.int16), (bits & 0x7F).to(torch.uint8),
        exponent[codes == escape].to(torch.uint8), code_bits,
    )  # fmt: skip


def join(planes: Planes) -> Tensor:
    """[F, D] bfloat16, the matrix that was split."""
    codes = planes.codes.to(torch.int32)
    exponent = planes.largest.to(torch.int32)[:, None] - codes
    exponent[codes == planes.escape] = planes.escaped.to(torch.int32)
    bits = (exponent << MANTISSA) | planes.mantissas.to(torch.int32)
    return torch.where(planes.signs, bits | ~0x7FFF, bits).to(torch.int16).view(torch.bfloat16)


def escapes(weight: Tensor, code_bits: int) -> float:
    """Bits that escaped exponents take for each weight, mean over a matrix.

    Of a matrix that has a shape alone (on torch's device `meta`): those of normally distributed weights.
    """
    if weight.is_meta:
        weight = torch.randn(DRAWN, weight.shape[1], generator=torch.Generator().manual_seed(0))
    distances, _ = _distances(weight)
    return EXPONENT * float((distances >= 2**code_bits - 1).double().mean())


def truncated(weight: Tensor, bits: int) -> Tensor:
    """The matrix with the first bits of each weight alone: sign, exponent and the top of the mantissa.

    Args:
        weight: [F, D], any dtype, read as bfloat16.
        bits: of the mantissa that are kept, 0 to 7. What lies below them is set to its middle.

    Returns:
        [F, D] in the dtype of the weight. Zeros and denormals are 0; infinities and NaN stay.
    """
    pattern = _pattern(weight)
    low = MANTISSA - bits
    kept = (pattern >> low << low) | ((1 << low) >> 1)
    exponent = (pattern >> MANTISSA) & 0xFF
    value = kept.to(torch.int16).view(torch.bfloat16).to(weight.dtype)
    value = value.masked_fill(exponent == 0, 0)
    return torch.where(exponent == 0xFF, weight, value)


def exponents(weight: Tensor, code_bits: int, mantissa_bits: int = 0) -> Tensor:
    """The image that the first plane gives.

    For each code, and each value of the mantissa's first bits where the plane has some, it is the mean magnitude of the
    weights, as a share of the row's largest power of two: one number for all of the matrix. The escape has one number.

    Args:
        weight: [F, D]. code_bits: of an exponent's code. mantissa_bits: of the mantissa that the plane has.

    Returns:
        [F, D] fp32.
    """
    places, scale, shares = means(weight, code_bits, mantissa_bits)
    return torch.copysign(shares[places.long()] * scale, weight.float())


def middles(weight: Tensor, code_bits: int, mantissa_bits: int = 0) -> Tensor:
    """The first plane with each weight in the middle of what its bits leave open. Arguments as of `exponents`.

    The escape leaves open all that is small, down to 0, and has its mean magnitude.

    Returns:
        [F, D] in the dtype of the weight.
    """
    distances, _ = _distances(weight)
    small = exponents(weight, code_bits, mantissa_bits).to(weight.dtype)
    return torch.where(distances >= 2**code_bits - 1, small, truncated(weight, mantissa_bits))


def means(weight: Tensor, code_bits: int, mantissa_bits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the first plane tells of each weight, and what it then counts. Arguments as of `exponents`.

    Returns:
        [F, D] int32, a place for each code and first bits of the mantissa; [F, 1] fp32, the largest power of two of
        each row; [places] fp32, the mean magnitude as a share of it.
    """
    pattern = _pattern(weight)
    distances, largest = _distances(weight)
    escape = 2**code_bits - 1
    top = (pattern & 0x7F) >> (MANTISSA - mantissa_bits)
    codes = torch.where(distances >= escape, escape << mantissa_bits, (distances << mantissa_bits) + top)
    scale = torch.exp2(largest.float() - 127)[:, None]
    magnitude = weight.float().abs() / scale
    return codes, scale, _means(codes, magnitude, (escape << mantissa_bits) + 1)


def high_bits(held: Packed, bits: int) -> Tensor:
    """[F, D] fp32, the image that the high bits of rounded weights give: for each value of them the mean code."""
    low = max(0, held.rounding.bits - bits)
    half = 2 ** (held.rounding.bits - 1)
    codes = held.codes.to(torch.int16)
    high = (codes + half) >> low
    return held.standing(_means(high, codes.float(), 2 ** (held.rounding.bits - low))[high.long()])


def _distances(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[F, D] int32, how far the exponents lie below their row's largest, and these [F]; of any dtype as bfloat16."""
    exponent = (_pattern(weight) >> MANTISSA) & 0xFF
    largest = exponent.amax(1)
    return largest[:, None] - exponent, largest


def _pattern(weight: Tensor) -> Tensor:
    """[F, D] int32, the bits of each weight as a bfloat16."""
    return weight.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32)


def _means(codes: Tensor, values: Tensor, count: int) -> Tensor:
    """[count] fp32, the mean value of each code; 0 for codes that do not come up."""
    flat = codes.reshape(-1).long()
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    sums.index_add_(0, flat, values.reshape(-1).double())
    return (sums / torch.bincount(flat, minlength=count).clamp_min(1)).float()
