"""Images as a GPU reads them: Triton kernels for one token through a copy of 4 bits, or through planes of bfloat16.

A copy has two codes in a byte, and its scales. In planes a weight is a sign and a code of its exponent in half a byte,
seven bits of mantissa in planes of their own, eight to a byte, and for the last code the exponent itself, in the order
of rows and columns (`planes`). A preview reads the half bytes, the first planes of the mantissa, and a number a row. An
exact row reads the other planes and its escaped exponents beside: where these begin follows from how many the rows
before it have, which is counted while the preview is read, so that no address is kept. The half bytes of a chosen row
are looked at a second time; a GPU has them in its cache where a layer's fit.

Planes are made beside the weights of the model, which prompts go on to multiply: what is shown here is that nothing but
what is counted has to be read. Like those of `gather` the kernels need a CUDA GPU, or Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.codes import Packed
from dart_eval.pruning.gather import COLUMNS, ROWS
from dart_eval.pruning.planes import MANTISSA, means, split

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = None

CODE_BITS, ESCAPE = 3, 7  # of an exponent's code, and the last of them

if triton is not None:

    @triton.jit
    def _show_copy(
        codes, scales, x, out, count, width, group, groups, pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """out[n] = sum over d of scale[n, d // group] * (code[n, d] - 8) * x[d]"""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = n.to(tl.int64)[:, None]
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = (n < count)[:, None] & (d < width)[None, :]
            pair = tl.load(codes + row * pairs + (d // 2)[None, :], mask=inside, other=0).to(tl.int32)
            code = ((pair >> ((d % 2) * 4)[None, :]) & 15) - 8
            scale = tl.load(scales + row * groups + (d // group)[None, :], mask=inside, other=0.0).to(tl.float32)
            part = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
            total += tl.sum(code.to(tl.float32) * scale * part[None, :], axis=1)
        tl.store(out + n, total, mask=n < count)

    @triton.jit
    def _show_plane(
        halves, mantissa, largest, shares, x, out, escapes, count, width, pairs, eighths,
        SHOWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """out[n] = 2^(largest[n] - 127) * sum over d of the plane's weight * x[d]; escapes[n]: how many codes are 7"""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = n.to(tl.int64)[:, None]
        total = tl.zeros((ROWS,), dtype=tl.float32)
        number = tl.zeros((ROWS,), dtype=tl.int32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = (n < count)[:, None] & (d < width)[None, :]
            pair = tl.load(halves + row * pairs + (d // 2)[None, :], mask=inside, other=0).to(tl.int32)
            half = (pair >> ((d % 2) * 4)[None, :]) & 15
            place = half & 7
            escaped = (place == 7) & inside
            for k in tl.static_range(SHOWN):
                plane = mantissa + k * count * eighths
                byte = tl.load(plane + row * eighths + (d // 8)[None, :], mask=inside, other=0).to(tl.int32)
                place = place * 2 + ((byte >> (d % 8)[None, :]) & 1)
            place = tl.where(escaped, 7 << SHOWN, place)
            weight = tl.load(shares + place, mask=inside, other=0.0)
            weight = tl.where(half >= 8, -weight, weight)
            total += tl.sum(weight * tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)[None, :], axis=1)
            number += tl.sum(escaped.to(tl.int32), axis=1)
        power = tl.load(largest + n, mask=n < count, other=0).to(tl.float32)
        tl.store(out + n, total * tl.exp2(power - 127), mask=n < count)
        tl.store(escapes + n, number, mask=n < count)

    @triton.jit
    def _read_planes(
        halves, mantissa, largest, exponents, starts, rows, x, out, taken, count, width, pairs, eighths,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """out[n] = weight[rows[n]] . x, the weight put together from all of its planes"""
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        number = tl.load(rows + n, mask=n < taken, other=0).to(tl.int64)
        row = number[:, None]
        before = tl.load(starts + number, mask=n < taken, other=0).to(tl.int32)
        top = tl.load(largest + number, mask=n < taken, other=0).to(tl.int32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = (n < taken)[:, None] & (d < width)[None, :]
            pair = tl.load(halves + row * pairs + (d // 2)[None, :], mask=inside, other=0).to(tl.int32)
            half = (pair >> ((d % 2) * 4)[None, :]) & 15
            code = half & 7
            low = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
            for k in tl.static_range(7):
                plane = mantissa + k * count * eighths
                byte = tl.load(plane + row * eighths + (d // 8)[None, :], mask=inside, other=0).to(tl.int32)
                low = low * 2 + ((byte >> (d % 8)[None, :]) & 1)
            escaped = ((code == 7) & inside).to(tl.int32)
            at = before[:, None] + tl.cumsum(escaped, axis=1) - 1
            own = tl.load(exponents + at, mask=escaped == 1, other=0).to(tl.int32)
            exponent = tl.where(escaped == 1, own, top[:, None] - code)
            weight = ((exponent << 23) | (low << 16)).to(tl.float32, bitcast=True)
            weight = tl.where(inside, tl.where(half >= 8, -weight, weight), 0.0)
            total += tl.sum(weight * tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)[None, :], axis=1)
            before += tl.sum(escaped, axis=1)
        tl.store(out + n, total, mask=n < taken)


def _grid(count: int) -> Any:
    return (-(-count // ROWS),)


def _packed(values: Tensor, bits: int) -> Tensor:
    """[..., ceil(D bits / 8)] uint8: numbers of so many bits side by side, the first lowest. values: [..., D]."""
    many = 8 // bits
    wide = pad(values.to(torch.int32), (0, -values.shape[-1] % many)).unflatten(-1, (-1, many))
    return (wide << torch.arange(0, 8, bits, device=values.device)).sum(-1).to(torch.uint8)


@dataclass(frozen=True)
class CopyCodes:
    """A copy of 4 bits, [F, D].

    Attributes:
        codes: [F, ceil(D / 2)] uint8, two codes in a byte, 8 more than what they stand for.
        scales: [F, groups] fp16. group: weights that share one. width: D.
    """

    codes: Tensor
    scales: Tensor
    group: int
    width: int

    @classmethod
    def of(cls, held: Packed) -> CopyCodes:
        """Of a matrix that was rounded to 4 bits."""
        width = held.codes.shape[1]
        codes = _packed(held.codes.to(torch.int32) + 8, 4)
        return cls(codes, held.scales.contiguous(), min(held.rounding.group, width) or width, width)

    def show(self, x: Tensor) -> Tensor:
        """[F] fp32, the product with the image. x: [D]."""
        count, pairs = self.codes.shape
        out = torch.empty(count, dtype=torch.float32, device=x.device)
        _show_copy[_grid(count)](
            self.codes, self.scales, x.contiguous(), out, count, self.width, self.group, self.scales.shape[1], pairs,
            ROWS, COLUMNS,
        )  # fmt: skip
        return out


class PlaneCodes:
    """A matrix of bfloat16 in planes, of which each is read by itself.

    Attributes:
        halves: [F, ceil(D / 2)] uint8, sign and code of the exponent of two weights in a byte.
        mantissa: [7, F, ceil(D / 8)] uint8, a bit of eight weights in a byte, the first bits first.
        largest: [F] uint8. exponents: [n] uint8, those that the last code stands for. shares: [places] fp32, the mean
            magnitude that the preview takes for each code and first bits of the mantissa.

    Args:
        weight: [F, D] bfloat16. shown: bits of the mantissa that the preview reads.
    """

    def __init__(self, weight: Tensor, shown: int) -> None:
        made, self.shown = split(weight, CODE_BITS), shown
        self.count, self.width = weight.shape
        self.halves = _packed(made.codes.to(torch.int32) + 8 * made.signs, 4)
        low = made.mantissas.to(torch.int32)
        self.mantissa = torch.stack([_packed((low >> (MANTISSA - 1 - k)) & 1, 1) for k in range(MANTISSA)])
        self.largest = made.largest.to(torch.uint8)
        self.exponents = made.escaped
        self.shares = means(weight, CODE_BITS, shown)[2].contiguous()
        self._starts: Tensor | None = None  # [F], where the escaped exponents of a row begin, once that is counted

    def show(self, x: Tensor) -> Tensor:
        """[F] fp32, the product with the image; the planes of the mantissa beyond `shown` are not read. x: [D]."""
        out = torch.empty(self.count, dtype=torch.float32, device=x.device)
        escapes = torch.empty(self.count, dtype=torch.int32, device=x.device)
        _show_plane[_grid(self.count)](
            self.halves, self.mantissa, self.largest, self.shares, x.contiguous(), out, escapes, self.count, self.width,
            self.halves.shape[1], self.mantissa.shape[2], self.shown, ROWS, COLUMNS,
        )  # fmt: skip
        self._starts = escapes.cumsum(0, dtype=torch.int32) - escapes
        return out

    def read(self, rows: Tensor, x: Tensor) -> Tensor:
        """[n] fp32, the exact product with some rows, after `show`. rows: [n] int. x: [D]."""
        assert self._starts is not None, "rows are read before the preview"
        out = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        if len(rows):
            _read_planes[_grid(len(rows))](
                self.halves, self.mantissa, self.largest, self.exponents, self._starts, rows, x.contiguous(), out,
                len(rows), self.count, self.width, self.halves.shape[1], self.mantissa.shape[2], ROWS, COLUMNS,
            )  # fmt: skip
        return out
