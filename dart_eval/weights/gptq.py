"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one by one, and later ones make up for their errors.

With H = X^T X of the inputs X and H^-1 = U^T U, U upper triangular, the error e = (w_j - q_j) / U_jj of column j
changes the columns k > j by -e U_jk. Columns go by descending H_jj (act-order), as far as groups of neighbours stay
together: the group with the largest H_jj first, its columns by H_jj (Gafni et al., arXiv 2505.14638). So a group's
scale fits the weights as earlier errors left them, and codes stay in the matrix's own order.

Not the authors': the scale search, and that columns which no token reaches are rounded to nearest, not set to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.codes import Packed

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns at most, after which all later ones take their errors
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the codes, as shares of a group's, tried in turn
ZEROS = (0, -1, 1)  # added to the zero that the range gives, tried likewise: with few bits one step is much


def factor_of(hessian: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the order of columns, [in], and U of the damped H in that order, [in, in] fp32.

    It takes one Cholesky decomposition in fp64: turned about, H is L L^T, so that U is L^-1 turned back.

    Args:
        hessian: [in, in] fp32, H.
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
    lower = torch.linalg.cholesky(wide.flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(width, out=torch.empty_like(lower)), upper=False)
    return order, inverse.flip(0, 1).float()


def quantised(weight: Tensor, order: Tensor, upper: Tensor, rounding: Rounding) -> Packed:
    """Round a matrix [out, in] to scale * (code - zero). order, upper: of its inputs and its groups (`factor_of`)."""
    width, half = weight.shape[1], 2 ** (rounding.bits - 1)
    group = min(rounding.group, width) or width
    rest = weight.float().T[order]  # [in, out], changed by the errors of earlier columns
    cost = upper.diagonal().square().reciprocal()[:, None]  # of a squared error that later columns make up for
    codes = torch.empty_like(rest, dtype=torch.int8)
    scales, zeros = rest.new_empty(2, -(-width // group), len(weight))
    start = 0
    for g in dict.fromkeys((order // group).tolist()):
        stop = start + min(group, width - g * group)
        scales[g], zeros[g] = scale, zero = best_grid(rest[start:stop], cost[start:stop], rounding.bits)
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            errors = torch.empty_like(rest[first:last])
            for i in range(first, last):
                away = _away(rest[i], scale, zero, rounding.bits)
                codes[i] = away + (zero - half)
                errors[i - first] = (rest[i] - scale * away) / upper[i, i]
                rest[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i - first], alpha=-1)
            rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
        start = stop
    back, offsets = codes[order.argsort()].T, scales * (half - zeros)
    return Packed(back.contiguous(), scales.T.half().contiguous(), rounding, offsets.T.contiguous())


def best_grid(group: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale (a number of fp16) and zero (a code) for each row's weights in a group, [out] fp32 each.

    For each of `RANGES` and `ZEROS` the scale is fitted to its codes by least squares; the least error wins.

    Args:
        group: [group, out] fp32.
        cost: of a squared error, [group, 1].
    """
    low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
    widest = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    best, least = (widest, torch.zeros_like(widest)), torch.full_like(widest, torch.inf)
    for added in ZEROS:
        zero = ((-low / widest).round() + added).clamp_(0, 2**bits - 1)
        for part in RANGES:
            away = _away(group, widest * part, zero, bits)
            square = (away.square() * cost).sum(0)
            scale = ((group * away * cost).sum(0) / torch.where(square == 0, 1.0, square)).half().float()
            error = ((scale * _away(group, scale, zero, bits) - group).square() * cost).sum(0)
            better = error < least
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
            least = torch.where(better, error, least)
    return best


def _away(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return codes less the zero, whole numbers in fp32. weights: [..., out]. scale, zero: [out]."""
    code = (weights / torch.where(scale == 0, 1.0, scale)).round_().add_(zero)
    return code.clamp_(0, 2**bits - 1).sub_(zero)
