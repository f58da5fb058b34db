"""From scores to masks: exactly k True per row; ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, keep: Tensor) -> Tensor:
    """True for the `keep[b]` largest scores of each row; ties go to the lower index.

    scores: [..., F]; keep: the same without F. Returns [..., F] bool with exactly keep[b] True in row b.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[-1], device=scores.device) < keep[..., None].to(scores.device)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def pick(scores: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """Per token, the `keep[b]` largest scores among the neurons it may pick.

    scores: [B, T, F], non-negative; among: bool, [B, 1, F] (its sequence's mask) or [B, T, F]; keep: [B], each at most
    the neurons there. Returns [B, T, F] bool with exactly keep[b] True for every token.
    """
    scores = scores.float().masked_fill(~among, -1.0)
    return top_k_mask(scores, keep[:, None].expand(scores.shape[:2]))
