"""What the parts of a method observe of sequences: in their contexts, and of recent tokens while they decode.

The parts say what is observed and what follows from it; here it is put together. Padding is left out of every sum.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import present, under
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.masks.change import ChangeState
from dart_eval.pruning.masks.remask import RemaskState
from dart_eval.pruning.masks.scores import FIRST_TOKEN
from dart_eval.pruning.session.prepared import Prepared
from dart_eval.pruning.session.sequence import PerSequence, Sums

CHUNK_BYTES = 64 << 20  # of fp32 activations observed at a time


class Observed(PerSequence):
    """What is known of B sequences under a method.

    Args:
        prepared: what the method has made of the model before any prompt, and for which sparsity.

    Attributes:
        sums: of each kind of part that observes, what it keeps (`score`, `choice`, `compensation`); beside a choice the
            tokens that `had` each neuron, where experts are routed.
        tokens: [B] context tokens seen. weight: [B] the sum of what they weigh.
        change: how much FFNs change the stream, where the allocation goes by it. remasking: where masks are made anew.
        dtype: of the model's activations, once seen.
    """

    def __init__(self, prepared: Prepared, batch: int, device: torch.device) -> None:
        self.prepared, self.method = prepared, prepared.method
        self.ffns: tuple[FFN, ...] = tuple(prepared.ffns)
        self.batch, self.device = batch, device
        self.dtype = torch.float32
        layers, remask = len(self.ffns), self.method.mask.remask
        self.sums = {part.slot: Sums(layers) for part in self.method.observers}
        if "choice" in self.sums and any(f.routed for f in self.ffns):
            self.sums["had"] = Sums(layers)
        self.tokens = torch.zeros(batch, device=device)
        self.weight = torch.zeros(batch, device=device)
        self.change: ChangeState | None = self.method.allocation.start(batch, self.ffns)
        watched = remask.remasks or remask.watches
        self.remasking = RemaskState(remask, self.ffns, batch, device) if watched else None

    def _token_weights(self, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the tokens of a context forward weigh [B, T] fp32, and by how much earlier sums shrink [B]."""
        mask = self.method.mask
        if mask.fixed or mask.score is None:
            return valid.float(), None
        return mask.score.token_weights(valid, self.tokens)

    @torch.no_grad()
    def observe(self, layer: int, h: Tensor, valid: Tensor, up: Tensor | None = None) -> None:
        """Take in context tokens.

        Args:
            h: [B, T, F], the input of the down projection. valid: [B, T] bool.
            up: [B, T, F], up x of a gated FFN, where a part wants it.
        """
        self.dtype = h.dtype
        if not self.sums:
            return
        up = up if self.method.choice.needs_up else None
        weight, shrink = self._token_weights(valid)
        if shrink is not None:
            for sums in self.sums.values():
                sums.shrink(layer, shrink)
        self.add(self.sums, layer, h, valid, up, weight)

    def add(
        self, into: dict[str, Sums], layer: int, h: Tensor, valid: Tensor, up: Tensor | None, weight: Tensor
    ) -> None:
        """Add what each part observes of these tokens to its sums, a few tokens at a time."""
        valid, weight = valid.to(h.device), weight.to(h.device)
        if not bool(valid.all()):  # padding may hold anything, NaN too
            h = h.masked_fill(~valid[..., None], 0)
            up = None if up is None else up.masked_fill(~valid[..., None], 0)
        ffn = self.ffns[layer]
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * ffn.pool))
        for start in range(0, h.shape[1], step):
            some = slice(start, start + step)
            hidden = ffn.spread(h[:, some].float(), some, h.shape[1])
            if ffn.routed and "had" in into:
                had = ffn.spread(present(ffn.routed, h[:, some], some, h.shape[1]), some, h.shape[1])
                into["had"].add(layer, (weight[:, None, some] @ had).squeeze(1))
            up_x = None if up is None else ffn.spread(up[:, some].float(), some, up.shape[1])
            for part in self.method.observers:
                sums = part.observe(hidden, up_x, weight[:, some]) if part.slot in into else None
                if sums is not None:
                    into[part.slot].add(layer, sums)

    @torch.no_grad()
    def observe_change(self, layer: int, y: Tensor, added: Tensor, valid: Tensor) -> None:
        """Take in what an FFN adds to the stream. y: the stream that enters it; both [B, T, D]."""
        if self.change is not None:
            self.change.observe(layer, y, added, valid)

    @torch.no_grad()
    def observe_attention(self, a: Tensor, valid: Tensor) -> None:
        """Take in the last layer's attention output of context tokens, [B, T, D]."""
        if self.remasking is not None:
            self.remasking.observe_attention(a, valid, self.tokens)

    def forget(self) -> None:
        """Forget what was observed so far, so that no mask is made from it."""
        for sums in self.sums.values():
            sums.forget()
        self.change = self.method.allocation.start(self.batch, self.ffns)
        self.tokens, self.weight = torch.zeros_like(self.tokens), torch.zeros_like(self.weight)

    # -- recent tokens ---------------------------------------------------------------------------------------

    def recent(self, layer: int, chosen: Tensor, dense: bool) -> dict[str, Tensor]:
        """What each part observes of recent tokens, per token, [b, F]; of experts that none had the old means.

        Args:
            chosen: [b] indices of sequences. dense: of tokens that ran dense after an alarm; else of those of the ring.
        """
        recent = self._fresh(layer, chosen) if dense else self._of_ring(layer, chosen)
        routed = self.ffns[layer].routed
        if routed is None:
            return recent
        weight = self.weight[chosen].clamp_min(FIRST_TOKEN)[:, None]
        for slot, mean in recent.items():
            each = mean.view(len(mean), -1, routed.inner)
            old = self.sums[slot][layer][chosen.to(mean.device)] / weight.to(mean.device)
            recent[slot] = torch.where((each == 0).all(-1, keepdim=True), old.view_as(each), each).view_as(mean)
        return recent

    def _fresh(self, layer: int, chosen: Tensor) -> dict[str, Tensor]:
        """Scores per token of those that ran dense after an alarm, [b, F]."""
        assert self.remasking is not None
        fresh = self.remasking.fresh[layer][chosen.to(self.remasking.fresh[layer].device)]
        return {"score": fresh / self.remasking.fresh_tokens[chosen].clamp_min(1)[:, None].to(fresh.device)}

    def _of_ring(self, layer: int, chosen: Tensor) -> dict[str, Tensor]:
        """What each part observes of the ring's tokens of the chosen sequences, per token, [b, F] by neuron."""
        remasking, ffn = self.remasking, self.ffns[layer]
        ring = None if remasking is None else remasking.ring
        assert remasking is not None and ring is not None and ring.valid is not None
        x = ring[layer]
        at = chosen.to(x.device)
        valid = ring.valid[chosen].to(x.device)
        recent = {slot: Sums(len(self.ffns)) for slot in self.sums}
        with under(ffn.routed, ring[remasking.routing(layer)][at]) if ffn.routed else nullcontext():
            a, u = ffn.parts(x[at])
            up = u if self.method.choice.needs_up else None
            self.add(recent, layer, a if u is None else a * u, valid, up, valid.float())
        count = valid.float().sum(1, keepdim=True).clamp_min(1)
        return {slot: sums[layer] / count for slot, sums in recent.items() if sums.layers[layer] is not None}
