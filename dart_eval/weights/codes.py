"""Matrices as low-bit codes: a weight is scale * code + offset, and neighbours in a row share a scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.util.bits import Rounding

PART = 1 << 18  # weights that are decoded at a time, so that they stay in a core's cache
LINE = 4  # first bits, from which on a line stands for them


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as codes and scales.

    Attributes:
        codes: [out, in] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scales: [out, groups] fp16 or fp32; a scale may be negative.
        rounding: the bits of a code, and the weights that share a scale.
        offsets: [out, groups] fp32, the value of code 0; None: 0.
    """

    codes: Tensor
    scales: Tensor
    rounding: Rounding
    offsets: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.codes.shape

    @property
    def values(self) -> Tensor:
        """[out, in] fp32, the values of the codes."""
        return self.decoded(torch.float32)

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype, first: int | None = None) -> Tensor:
        """Return [out, in], the values of the codes or of their first bits.

        Four first bits and more stand for a line (`line`), fewer for the mean of the matrix's codes that begin so, in
        whole codes, which a kernel multiplies.

        Args:
            first: bits of each code that are read; None: all.
        """
        low = 0 if first is None else max(0, self.rounding.bits - first)
        means = self.means(low) if low else None
        rows, width = self.shape
        group = min(self.rounding.group or width, width)
        out = self.codes.new_empty(self.shape, dtype=dtype)
        for start in range(0, rows, step := max(1, PART // width)):
            part = slice(start, start + step)
            codes = self.codes[part]
            if width % group:
                codes = torch.nn.functional.pad(codes, (0, -width % group))
            values = codes.float() if means is None else means.index_select(0, self._begin(codes, low))
            values = values.view(len(codes), -1, group)
            values *= self.scales[part].float()[..., None]
            if self.offsets is not None:
                values += self.offsets[part].float()[..., None]
            out[part] = values.flatten(1)[:, :width]
        return out

    def _begin(self, codes: Tensor, low: int) -> Tensor:
        """Return [n] int32, the first bits of codes, counted from 0. low: last bits that are not read."""
        return (codes.flatten().int() + 2 ** (self.rounding.bits - 1)) >> low

    def means(self, low: int) -> Tensor:
        """Return fp32 what each value of first bits stands for (`decoded`). low: last bits that are not read."""
        if self.scales.is_meta:  # a shape alone
            return self.scales.new_empty(2**self.rounding.bits >> low, dtype=torch.float32)
        if self.rounding.bits - low >= LINE:
            slope, middle = self.line(low)
            first = torch.arange(2**self.rounding.bits >> low, dtype=torch.float64, device=self.scales.device)
            return (slope * first + middle).float()
        code, number = self._histogram
        begin = self._begin(code, low).long()
        sums, count = torch.zeros(2, int(begin[-1]) + 1, dtype=torch.float64, device=code.device)
        sums.index_add_(0, begin, number * code)
        return (sums / count.index_add_(0, begin, number).clamp_min(1)).float().round()  # 0 where no code begins so

    def line(self, low: int) -> tuple[float, float]:
        """Return slope and offset of the codes over their first bits, by least squares over all of the matrix.

        A kernel multiplies such a line in whole numbers, and adds the last bits to it (`kernels.cpu`).

        Args:
            low: last bits that are not read. First bits count from 0.
        """
        code, number = self._histogram
        first, share = self._begin(code, low).double(), number / number.sum()
        away = first - share @ first
        spread = float(share @ away.square())
        slope = float(share @ (away * code)) / spread if spread else 2.0**low
        return slope, float(share @ (code - slope * first))

    @functools.cached_property
    def _histogram(self) -> tuple[Tensor, Tensor]:
        """All possible codes, ascending, and how often the matrix has each, [2^bits] fp64."""
        half = 2 ** (self.rounding.bits - 1)
        number = torch.zeros(2 * half, dtype=torch.float64, device=self.scales.device)
        for rows in self.codes.split(max(1, PART // self.shape[1])):
            number += torch.bincount(rows.flatten().int() + half, minlength=2 * half)
        return torch.arange(-half, half, device=self.scales.device), number
