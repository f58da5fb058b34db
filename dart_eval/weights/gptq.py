"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one by one, and later ones make up for their errors.

With H = X^T X of the inputs X and H^-1 = U^T U, U upper triangular, the error e = (w_j - q_j) / U_jj of column j
changes the columns k > j by -e U_jk. Columns go by descending H_jj (act-order), as far as groups of neighbours stay
together: the group with the largest H_jj first, its columns by H_jj (Gafni et al., arXiv 2505.14638). So a group's
scale fits the weights as earlier errors left them, and codes stay in the matrix's own order. A weight is
scale * (code - zero).

The authors set columns to 0 that no calibration token reaches; here they are rounded to nearest. The scale search is
not theirs either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.codes import Packed

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns at most, after which all later ones take their errors
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the codes, as shares of a group's, tried in turn


class Factor(NamedTuple):
    """What GPTQ needs to know of inputs.

    Attributes:
        order: [in], the columns as they are rounded.
        upper: [in, in] fp32, U of the damped H in that order.
    """

    order: Tensor
    upper: Tensor


def factor_of(hessian: Tensor, group: int) -> Factor:
    """Return the order of columns and the factor of H^-1, by one Cholesky decomposition in fp64.

    Args:
        hessian: [in, in] fp32.
        group: neighbours that share a scale.

    Raises:
        UserError: the inputs were no finite numbers.
    """
    width, diagonal = len(hessian), hessian.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise UserError("an FFN's inputs on the calibration text are not finite", "give another --dtype or text")
    groups = nn.functional.pad(diagonal, (0, -width % group), value=-1.0).view(-1, group)
    within = groups.argsort(dim=-1, descending=True, stable=True)
    within += torch.arange(0, groups.numel(), group, device=within.device)[:, None]
    order = within[groups.amax(-1).argsort(descending=True, stable=True)].flatten()
    order = order[order < width]
    wide = hessian[order][:, order].double()
    wide.diagonal().add_(DAMPING * float(wide.diagonal().mean()) or 1.0)
    # Turned about, H is L L^T; so U is L^-1 turned back.
    lower = torch.linalg.cholesky(wide.flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(width, out=torch.empty_like(lower)), upper=False)
    return Factor(order, inverse.flip(0, 1).float())


def quantised(weight: Tensor, factor: Factor, rounding: Rounding) -> Packed:
    """Round a matrix.

    Args:
        weight: [out, in].
        factor: of its inputs, for groups as the rounding has them.
        rounding: the bits of a code and of a zero, and the weights that share them.
    """
    (order, upper), width = factor, weight.shape[1]
    group = min(rounding.group, width) or width
    rest = weight.float().T[order]  # [in, out], with the errors of earlier columns
    cost = upper.diagonal().square().reciprocal()[:, None]  # of a squared error, once later columns made up for it
    codes = torch.empty_like(rest, dtype=torch.int8)
    scales, zeros = rest.new_empty(2, -(-width // group), len(weight))
    groups = (order // group).tolist()
    for start, stop in _blocks(groups):
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            g = groups[i]
            if i == 0 or g != groups[i - 1]:
                own = slice(i, i + min(group, width - g * group))
                scales[g], zeros[g] = best_grid(rest[own], cost[own], rounding.bits)
            away = _away(rest[i], scales[g], zeros[g], rounding.bits)
            codes[i] = away + (zeros[g] - 2 ** (rounding.bits - 1))
            errors[i - start] = (rest[i] - scales[g] * away) / upper[i, i]
            rest[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    offsets = scales * (2 ** (rounding.bits - 1) - zeros)
    back = codes[order.argsort()].T.contiguous()
    return Packed(back, scales.T.half().contiguous(), rounding, offsets.T.contiguous())


def _blocks(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Cut columns into blocks of `BLOCK` at most, each with whole groups or inside of one. groups: of the columns."""
    first = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    cuts = [0]
    for start, stop in zip(first, [*first[1:], len(groups)], strict=True):
        if stop - cuts[-1] > BLOCK and start > cuts[-1]:
            cuts.append(start)
        cuts += range(cuts[-1] + BLOCK, stop, BLOCK)
    return [*zip(cuts, [*cuts[1:], len(groups)], strict=True)]


def best_grid(group: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale (a number of fp16) and zero of each row's weights in a group, [out] fp32 each.

    Codes that just reach the group's range, which includes 0, give the zero. For each of `RANGES` the scale is fitted
    to its codes by least squares; the one with the least error wins.

    Args:
        group: [group, out] fp32.
        cost: of a squared error, [group, 1].
    """
    low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
    widest = (high - low) / (2**bits - 1)
    widest = torch.where(widest == 0, 1.0, widest)
    zero = (-low / widest).round_()
    best, least = widest, torch.full_like(widest, torch.inf)
    for part in RANGES:
        away = _away(group, widest * part, zero, bits)
        square = (away.square() * cost).sum(0)
        scale = ((group * away * cost).sum(0) / torch.where(square == 0, 1.0, square)).half().float()
        error = ((scale * _away(group, scale, zero, bits) - group).square() * cost).sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best, zero


def _away(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return codes less the zero, whole numbers in fp32. weights: [..., out]. scale, zero: [out]."""
    code = (weights / torch.where(scale == 0, 1.0, scale)).round_().add_(zero)
    return code.clamp_(0, 2**bits - 1).sub_(zero)
