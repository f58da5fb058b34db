"""From scores to masks: exactly k True per row; ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, keep: Tensor) -> Tensor:
    """True for the `keep[b]` largest scores of each row; ties go to the lower index.

    scores: [..., F], NaN counts as largest; keep: the same without F. Returns [..., F] bool with exactly keep[b]
    True in row b. By selection, not by sorting: tokens that pick their neurons do this for every layer.
    """
    size = scores.shape[-1]
    rows = scores.masked_fill(scores.isnan(), torch.inf).reshape(-1, size)
    counts = keep.to(scores.device).expand(scores.shape[:-1]).reshape(-1)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for count in counts.unique().tolist():  # few: layers with a uniform share have one
        if count == 0:
            continue
        same = (counts == count).nonzero().squeeze(1)
        x = rows[same]
        least = x.kthvalue(size - count + 1, dim=-1, keepdim=True).values
        above, ties = x > least, x == least
        chosen[same] = above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return chosen.view(scores.shape)


def pick(scores: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """Per token, the `keep[b]` largest scores among the neurons it may pick.

    scores: [B, T, F], non-negative; among: bool, [B, 1, F] (its sequence's mask) or [B, T, F]; keep: [B], each at most
    the neurons there. Returns [B, T, F] bool with exactly keep[b] True for every token.
    """
    scores = scores.float().masked_fill(~among, -1.0)
    return top_k_mask(scores, keep[:, None].expand(scores.shape[:2]))
