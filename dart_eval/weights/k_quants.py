"""llama.cpp's K-quants Q3_K, Q4_K and Q5_K (`ggml-quants.c`), with its importance weights where a text gives them.

A group of 16 or 32 neighbours in a row shares a 6-bit scale, in Q4_K and Q5_K also a 6-bit minimum. Eight or sixteen
groups, 256 weights, share 16-bit factors for these. So a format with minima costs as much as a 16-bit scale for 32
weights, and fits weights that are not centred at 0. llama.cpp searches 37 steps and some factors: with importance
that makes errors .1 and 1 % smaller on the demo model, and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.util.bits import BLOCK, K_QUANTS

MOST, MOST_SIGNED = 63, 31  # of a scale or a minimum, in units of its factor; of Q3_K's scales
STEPS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)  # added to the codes over a group's span in the search


def importance_of(rows: Tensor, squares: Tensor) -> Tensor:
    """Return how much the error of each weight counts: x^2 sqrt(s^2 + w^2), s^2 twice a block's mean square of w.

    rows: [R, in] fp32, w. squares: [in] fp32, the mean x^2 of each input on a text; all count a little.
    """
    own, mean = rows.square(), squares.mean()
    variance = torch.cat([2 * block.mean(1, keepdim=True).expand_as(block) for block in own.split(BLOCK, 1)], 1)
    return (variance + own).sqrt() * torch.where(mean > 0, squares + 1e-6 * mean, 1.0)


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
    scale, low = multiples(scale.clamp_min(0), bits, MOST), -multiples((-low).clamp_min(0), bits, MOST)
    half = 2 ** (bits - 1)
    code = ((groups - low) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, 2 * half - 1)
    return code - half, scale, low + half * scale


def _fitted(groups: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale and least value of each group, [R, G, 1] each."""

    def sums(values: Tensor) -> Tensor:
        return (values if importance is None else values * importance).sum(-1, keepdim=True)

    top, size = 2**bits - 1, sums(torch.ones_like(groups))
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    span = (groups.amax(-1, keepdim=True) - low).clamp_min(1e-12)
    total, best, least = sums(groups), (span / top, low), torch.full_like(low, torch.inf)
    for step in STEPS:
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


def multiples(values: Tensor, bits: int, most: int) -> Tensor:
    """Round scales or minima to whole multiples of their factors.

    Args:
        values: [R, G, 1] fp32.
        bits: of a code.
        most: of a multiple's absolute value.
    """
    rows, groups, _ = values.shape
    each = BLOCK // K_QUANTS[bits].group
    blocks = torch.nn.functional.pad(values.squeeze(-1), (0, -groups % each)).view(rows, -1, each)
    factor = (blocks.abs().amax(-1, keepdim=True) / most).half().float()
    whole = (blocks / torch.where(factor == 0, 1.0, factor)).round_().clamp_(-most, most)
    return (whole * factor).view(rows, -1)[:, :groups, None]
