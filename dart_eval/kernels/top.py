"""From scores to masks: exactly k True per row; ties go to the lower index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def top_k_mask(scores: Tensor, keep: Tensor) -> Tensor:
    """Return True for the `keep[b]` largest scores of each row; ties go to the lower index.

    Selects, and does not sort, since tokens that choose their neurons do this in every layer.

    Args:
        scores: [..., F]; NaN counts as largest.
        keep: [...].

    Returns:
        [..., F] bool with exactly keep[b] True in row b.
    """
    rows = scores.reshape(scores.shape[:-1].numel(), scores.shape[-1])
    counts = keep.cpu().expand(scores.shape[:-1]).reshape(-1)
    distinct = counts.unique().tolist()  # few: one with a uniform allocation
    if len(distinct) == 1:
        return _largest(rows, distinct[0]).view(scores.shape)
    chosen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    for count in distinct:
        same = (counts == count).nonzero().squeeze(1).to(rows.device)
        chosen[same] = _largest(rows[same], count)
    return chosen.view(scores.shape)


def largest(scores: Tensor, keep: Tensor, among: Tensor | None = None) -> Tensor:
    """Return per token the `keep[b]` largest scores, of all neurons or of some.

    Args:
        scores: [B, T, F], not negative.
        keep: [B], each at most the neurons in `among`.
        among: [B, T, F] bool, the neurons that each token may take; None: all.

    Returns:
        [B, T, F] bool with exactly keep[b] True for every token; ties go to the lower index.
    """
    scores = scores.float()
    if among is not None:
        # -1 for forbidden neurons; `masked_fill` takes a CPU ten times as long.
        most = among.view(torch.uint8) * torch.finfo(torch.float32).max - 1
        scores = torch.minimum(scores.nan_to_num(nan=torch.inf), most)
    return top_k_mask(scores, keep[:, None].expand(scores.shape[:2]))


def _largest(x: Tensor, count: int) -> Tensor:
    """Return True for the `count` largest of each row of [N, F]; ties go to the lower index."""
    if count in (0, x.shape[-1]):
        return torch.full(x.shape, count > 0, dtype=torch.bool, device=x.device)
    if x.device.type != "cpu":
        return _settled(x, count)
    chosen = ~(x < _least(x, count))  # NaN is chosen too
    uneven = (chosen.sum(-1) != count).nonzero().squeeze(1)  # ties at the least value, or NaN
    if len(uneven):
        chosen[uneven] = _settled(x[uneven], count)
    return chosen


def _settled(x: Tensor, count: int) -> Tensor:
    """The same with ties at the least value settled and NaN as the largest number."""
    x = x.masked_fill(x.isnan(), torch.inf)
    least = _least(x, count)
    above, ties = x > least, x == least
    return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _least(x: Tensor, count: int) -> Tensor:
    """Return [N, 1], the least of the `count` largest values of each row."""
    place = x.shape[-1] - count
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        # Several times as fast as torch's selection, which is not vectorised.
        return torch.from_numpy(np.partition(x.detach().numpy(), place, axis=-1)[:, place : place + 1].copy())
    return x.kthvalue(place + 1, dim=-1, keepdim=True).values
