"""One FFN under a method of masks and choices, for the sequences of a batch.

observe   dense tokens of the context: the score adds up its sums
finish    end of the context: a mask
prune     decoded tokens: h without the pruned neurons
remask    a new mask, from old scores and recent tokens
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dart_eval.layers.experts import under
from dart_eval.layers.ffn import device_of
from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.session.fitted import Fitted
from dart_eval.pruning.session.sequence import PerSequence

CHUNK_BYTES = 64 << 20  # of fp32 activations observed at a time


class Layer(PerSequence):
    """One FFN under a method, for B sequences. It knows no other layer.

    Args:
        fitted: the method on the FFN before any prompt.
        weight: [B], total weight of the tokens seen so far.
        shared: all sequences have one mask.

    Attributes:
        sums: [B, pool] fp32, sums of the score over the tokens so far; None before any, or without such a score.
        weight: [B], total weight of these tokens: one tensor for all layers.
        mask_counts, taken, written: [B] long, on the CPU: neurons in the mask, taken by a token, written by it.
        own: [B, pool] bool, the masks of these sequences; None if the method has one for all, or before `finish`.
        fresh: [B, pool] fp32, sums of the scores of tokens that run dense after an alarm.
        neurons_read: [B, T] fp64, neurons that the current tokens read, if the sparsity does not set it.
    """

    def __init__(self, fitted: Fitted, weight: Tensor, shared: bool) -> None:
        self.fitted, self.shared, self.ffn, self.method = fitted, shared, fitted.ffn, fitted.method
        self.sums: Tensor | None = None
        self.weight, batch = weight, len(weight)
        self.mask_counts = self.taken = self.written = torch.full((batch,), self.ffn.size)
        self.own: Tensor | None = None
        self.neurons_read: Tensor | None = None
        gathers = self.method.mask.remask.dense_tokens and self.method.mask.remask.alarms_remask
        self.fresh = torch.zeros(batch, self.ffn.pool, device=device_of(self.ffn)) if gathers else None

    def add_read(self, neurons: Tensor) -> None:
        """Add to what the current tokens read. neurons: [B, T] fp64, in neurons."""
        self.neurons_read = neurons if self.neurons_read is None else self.neurons_read + neurons

    # -- the context -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, h: Tensor, weight: Tensor) -> None:
        """Add context tokens.

        Args:
            h: [B, T, F], the input of the down projection.
            weight: [B, T] fp32, 1; 0 for padding.
        """
        if self.method.mask.fixed:
            return
        self.sums = self._added(self.sums, h, weight.to(h.device))

    def _added(self, sums: Tensor | None, h: Tensor, weight: Tensor) -> Tensor | None:
        """Return sums with the scores of these tokens, a few tokens at a time."""
        ffn, length, score = self.ffn, h.shape[1], self.method.mask.score
        assert score is not None
        padding = weight == 0
        if bool(padding.any()):  # padding may hold NaN
            h = h.masked_fill(padding[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * ffn.pool))
        for start in range(0, length, step):
            some = slice(start, start + step)
            new = score.observe(ffn.spread(h[:, some].float(), some, length), weight[:, some])
            sums = new if sums is None or new is None else sums + new
        return sums

    @torch.no_grad()
    def finish(self) -> None:
        """Make the mask at the end of the context, once the counts and the weight are set."""
        if not self.method.mask.fixed:
            self.own = self._best(self.per_token(), torch.arange(len(self.mask_counts)))

    def per_token(self) -> Tensor:
        """Return [B, pool] sums of the score, per token if sequences are compared (else only the order counts)."""
        assert self.sums is not None
        return self.sums / self._tokens(self.sums)[:, None] if self.shared else self.sums

    def scores(self, rows: slice) -> Tensor:
        """Return [pool], the scores of these sequences together."""
        score = self.method.mask.score
        assert score is not None
        return score.combine(self.per_token()[rows].mean(0, keepdim=True), self.fitted.factor)[0]

    def _tokens(self, sums: Tensor) -> Tensor:
        return self.weight.clamp_min(1).to(sums.device)

    def _best(self, sums: Tensor, rows: Tensor) -> Tensor:
        """Return the masks of the best neurons of the sequences `rows`. sums: [b, pool], theirs."""
        score, draw = self.method.mask.score, self.method.mask.draw
        assert score is not None
        number = self.ffn.layer
        if self.shared:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        scores = score.combine(sums, self.fitted.factor)
        return self.ffn.mask_of(lambda s, keep: draw.draw(s, keep, number, score), scores, self.mask_counts[rows.cpu()])

    @property
    def mask(self) -> Tensor:
        """[B or 1, pool] bool, the neurons that each sequence may use now."""
        return self.fitted.masked if self.own is None else self.own

    # -- decoded tokens --------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(
        self, h: Tensor, gate: Tensor | None = None, up: Tensor | None = None, dense: Tensor | None = None
    ) -> Tensor:
        """Return h without the neurons that tokens leave out.

        Args:
            h: [B, T, F], the input of the down projection.
            gate: [B, T, F], act(gate x), if tokens choose; None for a plain FFN.
            up: [B, T, F], up x, likewise.
            dense: [B] bool, sequences that run dense now; None: none.
        """
        if self.method.choice.chooses:
            mask = self._chosen(h, gate, up)
        else:
            mask = self.ffn.of_token(self.mask.to(h.device), len(h))
        if dense is not None:
            mask = mask | dense.to(h.device)[:, None, None]
        return h * mask.view(torch.uint8)  # four times as fast as booleans on a CPU

    def _chosen(self, h: Tensor, gate: Tensor | None, up: Tensor | None) -> Tensor:
        """Return the neurons that each token computes: [B, T, F] bool."""
        gate, up = h if gate is None else gate, h if up is None else up
        chosen = self.method.choice.choose(Token(h, gate, up, self.taken, self.written, self.fitted.threshold))
        if not self.method.choice.exact:
            self.neurons_read = self.fitted.neurons_read(chosen.sum(-1, dtype=torch.float64).cpu())
        return chosen

    # -- new masks -------------------------------------------------------------------------------------------

    def gather(self, h: Tensor, weight: Tensor) -> None:
        """Score tokens that run dense after an alarm. h: [B, T, F]; weight: [B, T] fp32, 0 for all others."""
        assert self.fresh is not None
        self.fresh = self._added(self.fresh, h, weight.to(h.device))

    def fresh_mean(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return [b, pool] scores per dense token. rows: [b] indices; tokens: [B], number of dense tokens."""
        assert self.fresh is not None
        at = rows.to(self.fresh.device)
        return self.fresh[at] / tokens[rows].clamp_min(1)[:, None].to(at.device)

    def clear(self, rows: Tensor) -> None:
        """Reset the scores of dense tokens of these sequences ([B] bool)."""
        if self.fresh is not None:
            self.fresh = self.fresh.masked_fill(rows.to(self.fresh.device)[:, None], 0.0)

    def recent(self, x: Tensor, valid: Tensor, routing: Tensor | None) -> Tensor:
        """Return the score's mean over recent tokens, [b, pool].

        Args:
            x: [b, R, D], their FFN inputs.
            valid: [b, R] bool.
            routing: their experts, see `experts.routing`.
        """
        weight = valid.to(x.device).float()
        with nullcontext() if self.ffn.routed is None or routing is None else under(self.ffn.routed, routing):
            a, u = self.ffn.parts(x)
            sums = self._added(None, a if u is None else a * u, weight)
        assert sums is not None
        return sums / weight.sum(1, keepdim=True).clamp_min(1)

    def remask(self, rows: Tensor, recent: Tensor, blend: float) -> list[float]:
        """Make new masks of the same size for some sequences: scores per token, blend * old + (1 - blend) * recent.

        Args:
            rows: [b] indices.
            recent: [b, pool], from `recent`.
            blend: weight of the old scores.

        Returns:
            [b] |old and new| / |old|.
        """
        assert self.own is not None and self.sums is not None
        at = rows.to(self.own.device)
        weight = self._tokens(self.own)[at][:, None]
        before = self.sums[at] / weight
        scores = blend * before + (1 - blend) * self._with_old(recent, before)
        new, old = self._best(scores, rows), self.own[at]
        # New tensors, not writes: layers copied with `select` may share the old ones.
        self.own = self.own.index_copy(0, at, new)
        return ((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist()

    def _with_old(self, recent: Tensor, old: Tensor) -> Tensor:
        """Return the recent means, with the old ones for experts that no recent token had: [b, pool] each."""
        if self.ffn.routed is None:
            return recent
        each = recent.view(len(recent), -1, self.ffn.routed.inner)
        return torch.where((each == 0).all(-1, keepdim=True), old.view_as(each), each).view_as(recent)
