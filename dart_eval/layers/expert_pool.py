"""Routed experts outside a forward: of earlier tokens, and of all experts at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dart_eval.layers.experts import Routed


def routing(routed: Routed, batch: int) -> Tensor:
    """Return [B, T, 2 count] fp32, the experts of each token of the current forward, and their weights."""
    counts = routed.weights if routed.inward is None else routed.inward
    return torch.cat([routed.index.float(), counts.float()], -1).view(batch, -1, 2 * routed.count)


@contextmanager
def under(routed: Routed, routing: Tensor) -> Iterator[None]:
    """Give tokens this routing inside: [..., 2 count]."""
    before = routed.index, routed.weights, routed.inward
    index, counts = routing.reshape(-1, 2 * routed.count).chunk(2, -1)
    routed.index, routed.weights = index.long(), counts
    if routed.inward is not None:
        routed.weights, routed.inward = torch.ones_like(counts), counts
    try:
        yield
    finally:
        routed.index, routed.weights, routed.inward = before
