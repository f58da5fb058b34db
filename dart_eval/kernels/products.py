"""Torch's own products with weights of few bits: what rounded weights, and previews by a rounded copy, really take.

On a CPU torch multiplies weights of 4 bits in groups (`_weight_int4pack_mm_for_cpu`) and of 8 bits with a scale a row
(`_weight_int8pack_mm`). For other bits and other devices it has none that takes our codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.codes import Packed

GROUPS = (32, 64, 128, 256)  # that the product of 4 bits takes
ROWS = 16  # of which it takes a multiple
REMEDY = "use 4, 4:64, 4:128 or 8:row"


def lacking(rounding: Rounding, width: int) -> str | None:
    """Why no packed product takes rows of `width` weights that are rounded so; None where one does."""
    bits, group = rounding.bits, rounding.group
    if (bits == 4 and group in GROUPS and width % group == 0) or (bits == 8 and (group == 0 or group >= width)):
        return None
    return f"torch has no packed product for {rounding.text} bits in rows of {width} weights"


def product(held: Packed, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias for a rounded matrix, through torch's packed product.

    Args:
        held: the codes. bias: [out], or None. dtype: of x and of what comes out.

    Raises:
        UserError: torch has no packed product for these bits.
    """
    if reason := lacking(held.rounding, held.codes.shape[1]):
        raise UserError(reason, REMEDY)
    scales, group = held.scales.to(dtype), held.rounding.group
    ops: Any = torch.ops.aten
    if held.rounding.bits == 4:
        rows = len(held.codes)
        beside = -rows % ROWS  # rows of zeros
        codes = ops._convert_weight_to_int4pack_for_cpu(pad(held.codes.int(), (0, 0, 0, beside)) + 8, 1)
        scales = pad(scales, (0, 0, 0, beside))
        offsets = torch.zeros_like(scales) if held.offsets is None else pad(held.offsets.to(dtype), (0, 0, 0, beside))
        scales = torch.stack([scales.T, offsets.T], -1).contiguous()

        def multiply(x: Tensor) -> Tensor:
            return ops._weight_int4pack_mm_for_cpu(x, codes, group, scales)[..., :rows]

    else:

        def multiply(x: Tensor) -> Tensor:
            return ops._weight_int8pack_mm(x, held.codes, scales[:, 0])

    def forward(x: Tensor) -> Tensor:
        out = multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    return forward


def grouping(rounding: Rounding, width: int) -> int | None:
    """Weights that share a scale in a product of 4 bits, where there is one for rows of `width` weights; else None.

    A scale of a whole row stands for each group of it.
    """
    groups = [g for g in GROUPS if width % g == 0 and rounding.group in (0, g)]
    return groups[-1] if rounding.bits == 4 and groups else None


def grouped(held: Packed) -> Packed:
    """A matrix of 4 bits whose scales are those of groups that the product takes; the values are the same."""
    width = held.codes.shape[1]
    group = grouping(held.rounding, width)
    assert group is not None
    scales = held.scales if held.rounding.group else held.scales.expand(-1, width // group)
    return Packed(held.codes, scales, Rounding(4, group), held.offsets)
