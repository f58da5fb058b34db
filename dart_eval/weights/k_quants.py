"""llama.cpp's K-quants Q3_K, Q4_K and Q5_K (`ggml-quants.c`), with its importance weights where a text gives them.

A group of 16 or 32 neighbours in a row shares a 6-bit scale, in Q4_K and Q5_K also a 6-bit minimum. Eight or sixteen
groups, 256 weights, share 16-bit factors for these. So a format with minima costs as much as a 16-bit scale for 32
weights, and fits weights that are not centred at 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dart_eval.util.bits import BLOCK, K_QUANTS

MOST, MOST_SIGNED = 63, 31  # of a scale or a minimum, in units of its factor; of Q3_K's scales
STEPS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)  # added to the codes over a group's span in the search
WEIGHED_STEPS = tuple(step / 10 for step in range(-9, 10))  # with importance; llama.cpp has 37 in this range
FACTOR_STEPS = tuple(step / 10 for step in range(-4, 5))  # added to the most in the search of a block's factor


def importance_of(rows: Tensor, squares: Tensor) -> Tensor:
    """Return how much the error of each weight counts: x^2 sqrt(s^2 + w^2), s^2 twice a block's mean square of w.

    Args:
        rows: [R, in] fp32, w.
        squares: [in] fp32, the mean x^2 of each input on the calibration text.
    """
    width = rows.shape[1]
    blocks = torch.nn.functional.pad(rows, (0, -width % BLOCK)).view(len(rows), -1, BLOCK).square()
    size = torch.full_like(blocks[0, :, 0], BLOCK)
    size[-1] -= -width % BLOCK
    variance = 2 * blocks.sum(-1) / size
    spread = (blocks + variance[..., None]).sqrt().flatten(1)[:, :width]
    mean = squares.mean()  # an input that the text never reaches still counts a little
    return spread * torch.where(mean > 0, squares + 1e-6 * mean, 1.0)


def with_minima(groups: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and offsets of groups whose weights are about scale * code - minimum, with codes from 0.

    Args:
        groups: [R, G, group] fp32.
        bits: of a code, 4 or 5.
        importance: of each weight's squared error, [R, G, group]; None: all count alike.

    Returns:
        [R, G, group] whole numbers from -2^(bits - 1), [R, G, 1] fp32 scales, and [R, G, 1] fp32 values of code 0.
    """
    scale, low = _fitted(groups, bits, importance)
    of_group = None if importance is None else importance.sum(-1, keepdim=True)
    scale = multiples(scale.clamp_min(0), bits, MOST, of_group)
    low = -multiples((-low).clamp_min(0), bits, MOST, of_group)
    half = 2 ** (bits - 1)
    code = ((groups - low) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, 2 * half - 1)
    return code - half, scale, low + half * scale


def _fitted(groups: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale and least value of each group, [R, G, 1] each."""

    def sums(values: Tensor) -> Tensor:
        return (values if importance is None else values * importance).sum(-1, keepdim=True)

    size: Any = groups.shape[-1] if importance is None else importance.sum(-1, keepdim=True)
    top = 2**bits - 1
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    span = (groups.amax(-1, keepdim=True) - low).clamp_min(1e-12)
    total, best, least = sums(groups), (span / top, low), torch.full_like(low, torch.inf)
    for step in STEPS if importance is None else WEIGHED_STEPS:
        code = ((groups - low) * ((top + step) / span)).round_().clamp_(0, top)
        codes, squares, products = sums(code), sums(code.square()), sums(groups * code)
        apart = size * squares - codes.square()
        scale = (size * products - total * codes) / apart
        shift = (squares * total - codes * products) / apart
        same = apart <= 1e-6 * size * squares  # codes that are all the same do not tell scale and minimum apart
        shift, alone = torch.where(same & (squares == 0), total / size, shift), same | (shift > 0)
        shift, scale = (
            torch.where(alone & (squares > 0), 0.0, shift.clamp_max(0)),
            torch.where(alone, products / squares.clamp_min(1e-12), scale),
        )
        error = sums((scale * code + shift - groups).square())
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, shift, best[1])
        least = torch.where(better, error, least)
    return best


def multiples(values: Tensor, bits: int, most: int, importance: Tensor | None = None) -> Tensor:
    """Round scales or minima to whole multiples of their factors.

    Args:
        values: [R, G, 1] fp32.
        bits: of a code.
        most: of a multiple's absolute value.
        importance: of each value's squared error, [R, G, 1]: the best of several factors is taken; None: the one that
            just reaches a block's largest value.
    """
    rows, groups, _ = values.shape
    each = BLOCK // K_QUANTS[bits].group
    blocks = torch.nn.functional.pad(values.squeeze(-1), (0, -groups % each)).view(rows, -1, each)
    largest = blocks.abs().amax(-1, keepdim=True)

    def whole(factor: Tensor) -> Tensor:
        return (blocks / torch.where(factor == 0, 1.0, factor)).round_().clamp_(-most, most)

    factor = (largest / most).half().float()
    if importance is not None:
        of_value = torch.nn.functional.pad(importance.squeeze(-1), (0, -groups % each)).view(rows, -1, each)
        least = torch.full_like(factor, torch.inf)
        for step in FACTOR_STEPS:
            tried = whole(largest / (most + step))
            square = (tried.square() * of_value).sum(-1, keepdim=True)
            fitted = ((tried * blocks * of_value).sum(-1, keepdim=True) / torch.where(square == 0, 1.0, square)).half()
            error = ((whole(fitted.float()) * fitted - blocks).square() * of_value).sum(-1, keepdim=True)
            factor = torch.where(error < least, fitted.float(), factor)
            least = torch.minimum(error, least)
    return (whole(factor) * factor).view(rows, -1)[:, :groups, None]
