"""What new masks are made from while a sequence is decoded: the ring's FFN inputs, or tokens that ran dense."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import under
from dart_eval.pruning.masks.scores import FIRST_TOKEN
from dart_eval.pruning.session.sequence import Sums

if TYPE_CHECKING:
    from dart_eval.pruning.session.state import SequenceState


def means(state: SequenceState, layer: int, chosen: Tensor, dense: bool) -> dict[str, Tensor]:
    """What each part observes of recent tokens, per token, [b, F] by neuron; of experts that none had the old means.

    Args:
        chosen: [b] indices of sequences. dense: of tokens that ran dense after an alarm; else of those of the ring.
    """
    recent = _fresh(state, layer, chosen) if dense else _of_ring(state, layer, chosen)
    routed = state.ffns[layer].routed
    if routed is None:
        return recent
    weight = state.weight[chosen].clamp_min(FIRST_TOKEN)[:, None]
    for slot, mean in recent.items():
        each = mean.view(len(mean), -1, routed.inner)
        old = state.sums[slot][layer][chosen.to(mean.device)] / weight.to(mean.device)
        recent[slot] = torch.where((each == 0).all(-1, keepdim=True), old.view_as(each), each).view_as(mean)
    return recent


def _fresh(state: SequenceState, layer: int, chosen: Tensor) -> dict[str, Tensor]:
    """Scores per token of those that ran dense after an alarm, [b, F]."""
    assert state.remasking is not None
    fresh = state.remasking.fresh[layer][chosen.to(state.remasking.fresh[layer].device)]
    return {"score": fresh / state.remasking.fresh_tokens[chosen].clamp_min(1)[:, None].to(fresh.device)}


def _of_ring(state: SequenceState, layer: int, chosen: Tensor) -> dict[str, Tensor]:
    """What each part observes of the ring's tokens of the chosen sequences, per token, [b, F] by neuron."""
    remasking, ffn = state.remasking, state.ffns[layer]
    ring = None if remasking is None else remasking.ring
    assert remasking is not None and ring is not None and ring.valid is not None
    x = ring[layer]
    at = chosen.to(x.device)
    valid = ring.valid[chosen].to(x.device)
    recent = {slot: Sums(len(state.ffns)) for slot in state.sums}
    with under(ffn.routed, ring[remasking.routing(layer)][at]) if ffn.routed else nullcontext():
        a, u = ffn.parts(x[at])
        up = u if state.method.choice.needs_up else None
        state.add(recent, layer, a if u is None else a * u, valid, up, valid.float())
    count = valid.float().sum(1, keepdim=True).clamp_min(1)
    return {slot: sums[layer] / count for slot, sums in recent.items() if sums.layers[layer] is not None}
