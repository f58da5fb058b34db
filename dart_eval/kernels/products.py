"""Torch's own products with low-bit weights, which time rounded weights and previews by a rounded copy.

Torch multiplies 4-bit weights in groups (`_weight_int4pack_mm`, on a CPU `_weight_int4pack_mm_for_cpu`) and 8-bit
weights with a scale a row (`_weight_int8pack_mm`). For other bits and devices it has no product that takes our codes.
What is for a CUDA GPU has not run on one.
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

GROUPS = (32, 64, 128, 256)  # group sizes of the 4-bit product
ROWS = 16  # it takes multiples of this
REMEDY = "use 4, 4:64, 4:128 or 8:row"


def lacking(
    rounding: Rounding, width: int, device: torch.device = torch.device("cpu"), dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Return why no packed product takes rows of `width` weights with this rounding; None if one does.

    Args:
        device: of the product. dtype: of what it multiplies.
    """
    bits, group = rounding.bits, rounding.group
    four = bits == 4 and group in GROUPS and width % group == 0
    if not four and not (bits == 8 and (group == 0 or group >= width)):
        return f"torch has no packed product for {rounding.text} bits in rows of {width} weights"
    if device.type == "cpu":
        return None
    has_kernel: Any = torch._C._dispatch_has_kernel_for_dispatch_key
    if device.type != "cuda" or not has_kernel(f"aten::_weight_int{bits}pack_mm", "CUDA"):
        return f"this torch has no packed product of {bits} bits for device {device.type}"
    if four and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        return "on a GPU torch's packed product of 4 bits is for bfloat16, from compute capability 8.0 on"
    return None


def product(held: Packed, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the function x -> x W^T + bias for a rounded matrix, through torch's packed product.

    Args:
        held: the codes.
        bias: [out], or None.
        dtype: of x and the output.

    Raises:
        UserError: torch has no packed product for these bits.
    """
    if reason := lacking(held.rounding, held.codes.shape[1]):
        raise UserError(reason, REMEDY)
    scales, group = held.scales.to(dtype), held.rounding.group
    ops: Any = torch.ops.aten
    if held.rounding.bits == 4:
        rows = len(held.codes)
        padding = (0, 0, 0, -rows % ROWS)
        on_cpu, numbers = held.codes.device.type == "cpu", pad(held.codes.int(), padding) + 8
        codes = ops._convert_weight_to_int4pack_for_cpu(numbers, 1) if on_cpu else _tiled(numbers)
        multiply_4 = ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        scales = pad(scales, padding)
        offsets = torch.zeros_like(scales) if held.offsets is None else pad(held.offsets.to(dtype), padding)
        scales = torch.stack([scales.T, offsets.T], -1).contiguous()

        def multiply(x: Tensor) -> Tensor:
            return multiply_4(x, codes, group, scales)[..., :rows]

    else:
        beside = -held.codes.shape[1] % ROWS  # in bfloat16 a CPU's product reads on to a multiple of this
        eight = pad(held.codes, (0, beside))

        def multiply(x: Tensor) -> Tensor:
            return ops._weight_int8pack_mm(pad(x, (0, beside)), eight, scales[:, 0])

    def forward(x: Tensor) -> Tensor:
        out = multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    return forward


def _tiled(numbers: Tensor) -> Tensor:
    """Return 4-bit numbers as a GPU's product takes them: in tiles of 16 columns, as many together as fit.

    Args:
        numbers: [F, D], from 0 to 15. Of two neighbours the first is the high half of a byte.
    """
    pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
    together = next(n for n in (8, 4, 2) if numbers.shape[1] % (16 * n) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, together)


def grouping(rounding: Rounding, width: int) -> int | None:
    """Return the group size of a 4-bit product for rows of `width` weights; None without one.

    A scale of a whole row is repeated for each of its groups.
    """
    groups = [g for g in GROUPS if width % g == 0 and rounding.group in (0, g)]
    return groups[-1] if rounding.bits == 4 and groups else None


def grouped(held: Packed) -> Packed:
    """Return a 4-bit matrix with scales in groups that the product takes; the values are the same."""
    width = held.codes.shape[1]
    group = grouping(held.rounding, width)
    assert group is not None
    scales = held.scales if held.rounding.group else held.scales.expand(-1, width // group)
    return Packed(held.codes, scales, Rounding(4, group), held.offsets)
