"""One FFN under a method of masks and choices, for the sequences of a batch.

observe   dense tokens of the context: the parts add up their sums
finish    end of the context: a mask, and the compensation of the neurons outside it
prune     decoded tokens: h without the pruned neurons
extra     the compensation that is added to down's output
remask    a new mask, from old scores and recent tokens
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import present, under
from dart_eval.layers.ffn import device_of
from dart_eval.pruning.choices.choice import ChoiceLayer, Token, of_rows
from dart_eval.pruning.masks.scores import alone
from dart_eval.pruning.part import Part
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
        sums: sums of each observing part over the tokens so far, [B, pool] fp32 by slot; with a choice and routed
            experts also the weight of the tokens that `had` each neuron.
        weight: [B], total weight of these tokens: one tensor for all layers.
        mask_counts, taken, written: [B] long, on the CPU: neurons in the mask, taken by a token, written by it.
        own: [B, pool] bool, the masks of these sequences; None if the method has one for all, or before `finish`.
        core: [B, pool] bool, the neurons that every token takes, if the choice ranks the others.
        constant: [B, D] fp32, the compensation of the neurons outside the mask; None without one.
        fresh: [B, pool] fp32, sums of the scores of tokens that run dense after an alarm.
        neurons_read: [B, T] fp64, neurons that the current tokens read, if the sparsity does not set it.
        dtype: of the model's activations, once seen.
    """

    def __init__(self, fitted: Fitted, weight: Tensor, shared: bool) -> None:
        self.fitted, self.shared, self.ffn, self.method = fitted, shared, fitted.ffn, fitted.method
        self.dtype = torch.float32
        self.sums: dict[str, Tensor] = {}
        self.weight, batch = weight, len(weight)
        self.mask_counts = self.taken = self.written = torch.full((batch,), self.ffn.size)
        self.own: Tensor | None = None
        self.core: Tensor | None = None
        self.constant: Tensor | None = None
        self.neurons_read: Tensor | None = None
        gathers = self.method.mask.remask.dense_tokens and self.method.mask.remask.alarms_remask
        self.fresh = torch.zeros(batch, self.ffn.pool, device=device_of(self.ffn)) if gathers else None

    def add_read(self, neurons: Tensor) -> None:
        """Add to what the current tokens read. neurons: [B, T] fp64, in neurons."""
        self.neurons_read = neurons if self.neurons_read is None else self.neurons_read + neurons

    # -- the context -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> None:
        """Add context tokens.

        Args:
            h: [B, T, F], the input of the down projection.
            up: [B, T, F], up x of a gated FFN, if a part needs it.
            weight: [B, T] fp32, 1; 0 for padding.
        """
        self.dtype = h.dtype
        if not self.method.observers:
            return
        self._add(self.sums, self.method.observers, h, up, weight.to(h.device))

    def _add(
        self, into: dict[str, Tensor], parts: Sequence[Part], h: Tensor, up: Tensor | None, weight: Tensor
    ) -> None:
        """Add the parts' sums over tokens, a few tokens at a time."""
        ffn, length = self.ffn, h.shape[1]
        up = up if self.method.choice.needs_up else None
        padding = weight == 0
        if bool(padding.any()):  # padding may hold NaN
            h = h.masked_fill(padding[..., None], 0)
            up = None if up is None else up.masked_fill(padding[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * ffn.pool))
        for start in range(0, length, step):
            some = slice(start, start + step)
            new: dict[str, Tensor | None] = {}
            if ffn.routed and any(part.slot == "choice" for part in parts):
                had = ffn.spread(present(ffn.routed, h[:, some], some, length), some, length)
                new["had"] = (weight[:, None, some] @ had).squeeze(1)
            hidden = ffn.spread(h[:, some].float(), some, length)
            up_x = None if up is None else ffn.spread(up[:, some].float(), some, length)
            new |= {part.slot: part.observe(hidden, up_x, weight[:, some]) for part in parts}
            for slot, sums in new.items():
                if sums is not None:
                    into[slot] = into[slot] + sums if slot in into else sums

    @torch.no_grad()
    def finish(self) -> None:
        """Make the mask and the compensation at the end of the context, once the counts and the weight are set."""
        everyone = torch.arange(len(self.mask_counts))
        if not self.method.mask.fixed:
            self.own = self._best(self.per_token(), everyone)
        if self.method.compensation.adds and self.fitted.constant is None and bool((self.weight > 0).any()):
            self.constant = self._constant(everyone)

    def per_token(self) -> Tensor:
        """Return [B, pool] sums of the score, per token if sequences are compared (else only the order counts)."""
        sums = self.sums["score"]
        return sums / self._tokens(sums)[:, None] if self.shared else sums

    def scores(self, rows: slice) -> Tensor:
        """Return [pool], the scores of these sequences together."""
        score = self.method.mask.score
        assert score is not None
        return score.combine(self.per_token()[rows].mean(0, keepdim=True), self.fitted.factor)[0]

    def _tokens(self, sums: Tensor) -> Tensor:
        return self.weight.clamp_min(1).to(sums.device)

    def _best(self, sums: Tensor, rows: Tensor) -> Tensor:
        """Return the masks of the best neurons of the sequences `rows`. sums: [b, pool], theirs."""
        score, draw, choice = self.method.mask.score, self.method.mask.draw, self.method.choice
        assert score is not None
        number, at = self.ffn.layer, rows.cpu()
        if self.shared:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        scores = score.combine(sums, self.fitted.factor)
        if choice.ranks:
            core = draw.draw(scores, choice.core(self.taken[at]), number, score)
            self.core = core if self.core is None else self.core.index_copy(0, rows.to(core.device), core)
        return self.ffn.mask_of(lambda s, keep: draw.draw(s, keep, number, score), scores, self.mask_counts[at])

    @property
    def mask(self) -> Tensor:
        """[B or 1, pool] bool, the neurons that each sequence may use now."""
        return self.fitted.masked if self.own is None else self.own

    def _means(self) -> Tensor | None:
        """Return [B or 1, pool], the means that replace neurons; None if there are none."""
        if self.fitted.mean is not None:
            return self.fitted.mean[None]
        sums = self.sums.get("compensation")
        return None if sums is None else sums / self._tokens(sums)[:, None]

    def _constant(self, rows: Tensor) -> Tensor:
        """Return [b, D] fp32, the mean output per token of the neurons outside these sequences' masks."""
        mean, mask = self._means(), self.mask
        assert mean is not None
        mean, mask = (x[rows.to(x.device)] if len(x) > 1 else x for x in (mean, mask))
        return self.fitted.stand_in(mean.expand(len(rows), -1), mask, self.dtype)

    # -- decoded tokens --------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(
        self, h: Tensor, gate: Tensor | None = None, up: Tensor | None = None, rows: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return h without the neurons that tokens leave out.

        Args:
            h: [B, T, F], the input of the down projection.
            gate: [B, T, F], act(gate x), if tokens choose; None for a plain FFN.
            up: [B, T, F], up x, likewise.
            rows: [K], the neurons that these tensors hold, if only the mask's; None: all.
            dense: [B] bool, sequences that run dense now; None: none.
        """
        if rows is not None:
            mask = h.new_ones(1, 1, h.shape[-1], dtype=torch.bool)
        else:
            mask = self.ffn.of_token(self.mask.to(h.device), len(h))
        if self.fitted.chooser is not None:
            mask = self._chosen(self.fitted.chooser, h, gate, up, rows, mask)
        if dense is not None:
            mask = mask | dense.to(h.device)[:, None, None]
        mean = self._means() if self.method.compensation.fills else None
        if mean is not None:
            return torch.where(mask, h, mean[:, None].to(h.device, h.dtype))
        return h * mask.view(torch.uint8)  # four times as fast as booleans on a CPU

    def _chosen(
        self, chooser: ChoiceLayer, h: Tensor, gate: Tensor | None, up: Tensor | None, rows: Tensor | None,
        allowed: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the neurons of the mask that each token computes: [B, T, F] bool."""
        score = self.method.mask.score
        token = Token(
            h, h if gate is None else gate, h if up is None else up, self.context_rms(rows), rows=rows,
            allowed=allowed, taken=self.taken, written=self.written,
        )  # fmt: skip
        if self.core is not None and score is not None:
            factor = self.fitted.factor
            token.core = of_rows(self.core.to(h.device), rows)[:, None]
            factor = None if factor is None else of_rows(factor.to(h.device), rows)
            token.alone = functools.partial(alone, score, h * allowed, factor)
        chosen = chooser.choose(token)
        if not self.method.choice.exact:
            self.neurons_read = self.fitted.neurons_read(chosen.sum(-1, dtype=torch.float64).cpu())
        return chosen

    def extra(self, dense: Tensor | None = None) -> Tensor | None:
        """Return [B, 1, D] to add to down's output: the compensation.

        Args:
            dense: [B] bool, sequences that run dense now, to which nothing is added; None: none.
        """
        constant = self.fitted.constant if self.constant is None else self.constant
        if constant is None:
            return None
        if dense is not None:
            constant = constant.masked_fill(dense.to(constant.device)[:, None], 0)
        return constant[:, None]

    def context_rms(self, rows: Tensor | None = None) -> Tensor | None:
        """Return [B, 1, F] fp32, root of the choice's sums, up to a factor per sequence; None without sums.

        An expert takes the mean over the tokens that had it. An expert without tokens takes the others' average.

        Args:
            rows: [K], the neurons to return; None: all.
        """
        squares = self.sums.get("choice")
        if squares is None:
            return None
        if self.ffn.routed:
            had = self.sums["had"]
            squares = torch.where(had > 0, squares / had.clamp_min(1), 0)
            seen = (had > 0).sum(-1, keepdim=True)
            average = torch.where(seen > 0, squares.sum(-1, keepdim=True) / seen.clamp_min(1), 1)
            squares = torch.where(had > 0, squares, average)
        return of_rows(self.ffn.of_token(squares, len(self.mask_counts)), rows).sqrt()

    # -- new masks -------------------------------------------------------------------------------------------

    def gather(self, h: Tensor, weight: Tensor) -> None:
        """Score tokens that run dense after an alarm. h: [B, T, F]; weight: [B, T] fp32, 0 for all others."""
        assert self.fresh is not None
        into = {"score": self.fresh}
        self._add(into, [part for part in self.method.observers if part.slot == "score"], h, None, weight.to(h.device))
        self.fresh = into["score"]

    def fresh_mean(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return [b, pool] scores per dense token. rows: [b] indices; tokens: [B], number of dense tokens."""
        assert self.fresh is not None
        at = rows.to(self.fresh.device)
        return self.fresh[at] / tokens[rows].clamp_min(1)[:, None].to(at.device)

    def clear(self, rows: Tensor) -> None:
        """Reset the scores of dense tokens of these sequences ([B] bool)."""
        if self.fresh is not None:
            self.fresh = self.fresh.masked_fill(rows.to(self.fresh.device)[:, None], 0.0)

    def recent(self, x: Tensor, valid: Tensor, routing: Tensor | None) -> dict[str, Tensor]:
        """Return each part's mean over recent tokens, [b, pool] by slot.

        Args:
            x: [b, R, D], their FFN inputs.
            valid: [b, R] bool.
            routing: their experts, see `expert_pool`.
        """
        totals: dict[str, Tensor] = {}
        with nullcontext() if self.ffn.routed is None or routing is None else under(self.ffn.routed, routing):
            a, u = self.ffn.parts(x)
            self._add(totals, self.method.observers, a if u is None else a * u, u, valid.to(x.device).float())
        count = valid.to(x.device).float().sum(1, keepdim=True).clamp_min(1)
        return {slot: sums / count for slot, sums in totals.items()}

    def remask(self, rows: Tensor, recent: dict[str, Tensor], blend: float) -> list[float]:
        """Make new masks of the same size for some sequences: scores per token, blend * old + (1 - blend) * recent.

        Args:
            rows: [b] indices.
            recent: from `recent`.
            blend: weight of the old scores.

        Returns:
            [b] |old and new| / |old|.
        """
        assert self.own is not None
        at = rows.to(self.own.device)
        weight = self._tokens(self.own)[at][:, None]
        recent = self._with_old(recent, at, weight)
        scores = blend * self.sums["score"][at] / weight + (1 - blend) * recent.pop("score")
        new, old = self._best(scores, rows), self.own[at]
        # New tensors, not writes: layers copied with `select` may share the old ones.
        self.own = self.own.index_copy(0, at, new)
        for slot, mean in recent.items():  # as sums again, so that a further turn of the context adds to them
            sums = self.sums[slot]
            self.sums[slot] = sums.index_copy(0, at, blend * sums[at] + (1 - blend) * mean * weight)
        if self.constant is not None:
            self.constant = self.constant.index_copy(0, at, self._constant(rows))
        return ((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist()

    def _with_old(self, recent: dict[str, Tensor], at: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return the recent means, with the old ones for experts that no recent token had."""
        routed = self.ffn.routed
        if routed is None:
            return {**recent}
        filled = {}
        for slot, mean in recent.items():
            each = mean.view(len(mean), -1, routed.inner)
            old = (self.sums[slot][at] / weight).view_as(each)
            filled[slot] = torch.where((each == 0).all(-1, keepdim=True), old, each).view_as(mean)
        return filled
