"""4-bit copies for a GPU: a Triton kernel for the product of one token with such a copy.

A copy has two codes in a byte, and scales. Like those of `gather`, the kernel needs a CUDA GPU or Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.kernels.gather import COLUMNS, ROWS, tl, triton
from dart_eval.weights.codes import Packed

if triton is not None:

    @triton.jit
    def _multiply_copy(
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


@dataclass(frozen=True)
class CopyCodes:
    """A 4-bit copy of a matrix [F, D].

    Attributes:
        codes: [F, ceil(D / 2)] uint8, two codes in a byte, the first one low, with an offset of 8.
        scales: [F, groups] fp16.
        group: weights that share a scale.
        width: D.
    """

    codes: Tensor
    scales: Tensor
    group: int
    width: int

    @classmethod
    def of(cls, held: Packed) -> CopyCodes:
        """Pack a matrix that was rounded to 4 bits."""
        width = held.codes.shape[1]
        wide = pad((held.codes + 8).to(torch.uint8), (0, width % 2)).unflatten(1, (-1, 2))
        codes = wide[..., 0] | wide[..., 1] << 4
        return cls(codes, held.scales.contiguous(), min(held.rounding.group, width) or width, width)

    def times(self, x: Tensor) -> Tensor:
        """Return [F] fp32, the product with the copy. x: [D]."""
        count, pairs = self.codes.shape
        out = torch.empty(count, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _multiply_copy[(-(-count // ROWS),)](
                self.codes, self.scales, x.contiguous(), out, count, self.width, self.group, self.scales.shape[1],
                pairs, ROWS, COLUMNS,
            )  # fmt: skip
        return out
