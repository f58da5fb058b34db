"""What a token looks at before it chooses: previews through images, or the score of its own activations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dart_eval.pruning.choices.choices import Token
from dart_eval.pruning.masks.scores import FIRST_TOKEN, Score
from dart_eval.pruning.session.sequence import Sums

if TYPE_CHECKING:
    from dart_eval.pruning.session.state import SequenceState


class Cores(Sums):
    """For each layer the neurons of each sequence's mask that no token leaves out, [B, F] bool by neuron."""

    def keep(self, layer: int, rows: Tensor, core: Tensor) -> None:
        """Replace those of some sequences; at first there are all of them. rows: [b] indices; core: [b, F]."""
        if self.layers[layer] is None:
            self.add(layer, core)
        else:
            self.put(layer, rows.to(core.device), core)


def looked(
    state: SequenceState, layer: int, token: Token, allowed: Tensor, x: Tensor | None, rows: Tensor | None = None
) -> Token:
    """The token with what its choice looks at beside what the layer has computed.

    Args:
        allowed: [B or 1, 1, F] bool, the neurons of each sequence's mask. x: [B, T, D], the FFN's input.
        rows: [K], the neurons that the token has, where they are not all.
    """
    prepared, ffn, choice = state.prepared, state.ffns[layer], state.method.choice
    if prepared.thresholds is not None:
        token = replace(token, threshold=prepared.thresholds[layer])
    if prepared.previews is not None and x is not None:
        images = prepared.previews[layer]
        preview, expected = (_of(seen, rows) for seen in images.look(*choice.shown(x, images.order)))
        columns = None if images.columns is None else ffn.of_token(_of(images.columns, rows)[None], len(x))
        token = replace(token, preview=preview, expected=expected, columns=columns)
    score = state.method.mask.score
    if choice.ranks and score is not None:
        factor = prepared.factor(layer)
        if factor is not None:
            factor = _of(factor.to(token.h.device), rows)
        core = _of(state.cores[layer].to(token.h.device), rows)[:, None]
        token = replace(token, core=core, score=alone(score, token.h * allowed, factor))
    return token


def _of(x: Tensor, rows: Tensor | None) -> Tensor:
    """[..., F] -> [..., K], of these neurons."""
    return x if rows is None else x.index_select(-1, rows)


def usual(state: SequenceState, layer: int, rows: Tensor | None) -> Tensor | None:
    """[B, T or 1, F or K] fp32, root of what the choice observed, up to a factor per sequence; None: nothing.

    Of an expert the mean over the tokens that had it; where none had, as of the others' neurons on average.
    """
    sums, ffn = state.sums.get("choice"), state.ffns[layer]
    if sums is None or sums.layers[layer] is None:
        return None
    found = sums[layer]
    if ffn.routed:
        had = state.sums["had"][layer]
        found = torch.where(had > 0, found / had.clamp_min(FIRST_TOKEN), 0)
        seen = (had > 0).sum(-1, keepdim=True)
        average = torch.where(seen > 0, found.sum(-1, keepdim=True) / seen.clamp_min(1), 1)
        found = torch.where(had > 0, found, average)
    return _of(ffn.of_token(found, state.batch), rows).sqrt()


def shown(state: SequenceState, layer: int, rough: Tensor, token: Token) -> Tensor:
    """[B, T, D], what neurons add that write as the image shows them. rough: which ones, [B, T, F] bool."""
    previews = state.prepared.previews
    assert previews is not None and token.preview is not None
    return previews[layer].write(token.preview * rough.view(torch.uint8))


def alone(score: Score, h: Tensor, factor: Tensor | None) -> Tensor:
    """The score that a mask from this token alone would have: [B, T, F] fp32.

    Args:
        h: [B, T, F]. factor: what no token changes in the score, in the order of h.
    """
    tokens = h.float().reshape(-1, 1, h.shape[-1])
    sums = score.observe(tokens, None, torch.ones(tokens.shape[:2], device=h.device))
    assert sums is not None
    return score.combine(sums, factor).view(h.shape)
