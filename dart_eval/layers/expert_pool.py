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


def present(routed: Routed, h: Tensor, some: slice, tokens: int) -> Tensor:
    """Return 1 for every neuron that a token has, else 0: like h [B, t, F].

    Args:
        some: the place of these tokens among the last `tokens` of the current forward.
    """
    index = routed.index[len(routed.index) - len(h) * tokens :].view(len(h), tokens, routed.count)[:, some]
    return (index >= 0).float().repeat_interleave(routed.inner, -1)


def write_all(routed: Routed, h: Tensor) -> Tensor:
    """Return the output of all experts' neurons together, without a bias: [b, pool] -> [b, D]."""
    each = h.view(len(h), -1, routed.inner)
    return torch.stack([routed.times(each[:, e], "down_proj", e) for e in range(routed.all)]).sum(0)
