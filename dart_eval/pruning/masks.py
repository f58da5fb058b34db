"""From scores to masks: exactly k True per row; ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, keep: Tensor) -> Tensor:
    """True for the `keep[b]` largest scores of each row; ties go to the lower index.

    scores: [..., F], NaN counts as largest; keep: the same without F. Returns [..., F] bool with exactly keep[b]
    True in row b. By selection, not by sorting: tokens that pick their neurons do this for every layer.
    """
    rows = scores.masked_fill(scores.isnan(), torch.inf).reshape(scores.shape[:-1].numel(), scores.shape[-1])
    counts = keep.cpu().expand(scores.shape[:-1]).reshape(-1)  # grouped on the CPU, where they are made
    distinct = counts.unique().tolist()  # few: layers with a uniform share have one
    if len(distinct) == 1:
        return _largest(rows, distinct[0]).view(scores.shape)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for count in distinct:
        same = (counts == count).nonzero().squeeze(1).to(rows.device)
        chosen[same] = _largest(rows[same], count)
    return chosen.view(scores.shape)


def _largest(x: Tensor, count: int) -> Tensor:
    """True for the `count` largest of each row of [N, F], ties to the lower index."""
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    least = x.kthvalue(x.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, ties = x > least, x == least
    return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def pick(scores: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """Per token, the `keep[b]` largest scores among the neurons it may pick.

    scores: [B, T, F], non-negative; among: bool, [B, 1, F] (its sequence's mask) or [B, T, F]; keep: [B], each at most
    the neurons there. Returns [B, T, F] bool with exactly keep[b] True for every token.
    """
    scores = scores.float().masked_fill(~among, -1.0)
    return top_k_mask(scores, keep[:, None].expand(scores.shape[:2]))
