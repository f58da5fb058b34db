"""One FFN under a method of masks and choices, for the sequences of a batch.

observe   tokens of the context pass, dense: the parts add up what they need
finish    the context is over: a mask, and what stands in for the neurons outside it
prune     decoded tokens: h without the neurons that they leave out
extra     what is added to down's output in their place
remask    a new mask, from old scores and recent tokens
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import present, under, write_all
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.choices.choice import ChoiceLayer, Token, of_rows
from dart_eval.pruning.masks.scores import FIRST_TOKEN, alone
from dart_eval.pruning.method import Paid, Pruner
from dart_eval.pruning.part import Part
from dart_eval.pruning.session.sequence import PerSequence, nbytes

CHUNK_BYTES = 64 << 20  # of fp32 activations observed at a time


@dataclass
class Fitted:
    """A method on one FFN before any prompt: what is the same for all sequences.

    Attributes:
        paid: what is read of a neuron, see `Pruner.paid`.
        factor: [F] fp32 (or several such rows), what no token changes in a score; None.
        mask: [1, pool] bool, where all sequences have one, unless it holds every neuron; else None.
        mean: [pool] fp32, of each neuron on the calibration text, where it stands in for the neuron; else None.
        constant: [1, D] fp32, what stands in for the neurons outside a fixed mask; None.
        chooser: the choice at work; None where tokens compute the whole mask.
    """

    method: Pruner
    ffn: FFN
    paid: Paid
    factor: Tensor | None = None
    mask: Tensor | None = None
    mean: Tensor | None = None
    constant: Tensor | None = None
    chooser: ChoiceLayer | None = None

    @property
    def masked(self) -> Tensor:
        """[1, pool] bool, the mask of sequences that have none of their own."""
        if self.mask is not None:
            return self.mask
        return torch.ones(1, self.ffn.pool, dtype=torch.bool, device=device_of(self.ffn))

    def nbytes(self) -> int:
        """Bytes that it keeps."""
        return nbytes([self.factor, self.mask, self.mean, self.constant])

    def spent(self, taken: Tensor) -> Tensor:
        """What tokens read that take so many neurons and write them, counted in neurons."""
        every, whole, rest, write = self.paid
        return ((every + whole) * self.ffn.size + (rest + write) * taken) / self.ffn.matrices

    def stand_in(self, mean: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """What the neurons outside masks add per token, where each is at its mean: [b, D] fp32.

        Args:
            mean: [b or 1, pool] fp32. mask: [b or 1, pool] bool. dtype: of the model's activations.
        """
        left_out = torch.where(mask, 0.0, mean.to(mask.device)).to(dtype)
        routed = self.ffn.routed
        return write_all(routed, left_out).float() if routed else self.ffn.write(left_out)


class Layer(PerSequence):
    """One FFN under a method, for B sequences. It knows no other layer.

    Args:
        fitted: what the method has made of the FFN before any prompt. shared: all sequences have one mask.
        weight: [B], what the tokens weigh that were seen so far.

    Attributes:
        sums: what each observing part has of the tokens so far, [B, pool] fp32 by slot; beside a choice the tokens that
            `had` each neuron, where experts are routed.
        weight: [B], what these tokens weigh together: one tensor for all layers.
        kept, taken, written: [B] long, on the CPU: neurons of the mask, those of them that a token takes, those of
            these that it writes.
        own: [B, pool] bool, the masks of these sequences; None where the method has one for all, or before `finish`.
        core: [B, pool] bool, the neurons that every token takes, where the choice ranks the others.
        constant: [B, D] fp32, what stands in for the neurons outside the mask; None where nothing of theirs does.
        fresh: [B, pool] fp32, sums of the scores of tokens that run dense after an alarm.
        spent: [B, T] fp64, neurons that the tokens under way read, where the sparsity does not set it.
        dtype: of the model's activations, once seen.
    """

    def __init__(self, fitted: Fitted, weight: Tensor, shared: bool) -> None:
        self.fitted, self.shared, self.ffn, self.method = fitted, shared, fitted.ffn, fitted.method
        self.dtype = torch.float32
        self.sums: dict[str, Tensor] = {}
        self.weight, batch = weight, len(weight)
        self.kept = self.taken = self.written = torch.full((batch,), self.ffn.size)
        self.own: Tensor | None = None
        self.core: Tensor | None = None
        self.constant: Tensor | None = None
        self.spent: Tensor | None = None
        gathers = self.method.mask.remask.dense_tokens and self.method.mask.remask.alarms_remask
        self.fresh = torch.zeros(batch, self.ffn.pool, device=device_of(self.ffn)) if gathers else None

    # -- the context -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor, shrink: Tensor | None = None) -> None:
        """Take in context tokens.

        Args:
            h: [B, T, F], the input of the down projection. up: [B, T, F], up x of a gated FFN, where a part wants it.
            weight: [B, T] fp32, what each token counts; 0 for padding.
            shrink: [B], by how much tokens before these shrink; None: not at all.
        """
        self.dtype = h.dtype
        if not self.method.observers:
            return
        weight = weight.to(h.device)
        if shrink is not None:
            factor = shrink.to(h.device)
            self.sums = {slot: sums * factor[:, None] for slot, sums in self.sums.items()}
        self._add(self.sums, self.method.observers, h, up, weight)

    def _add(
        self, into: dict[str, Tensor], parts: Sequence[Part], h: Tensor, up: Tensor | None, weight: Tensor
    ) -> None:
        """Add what these parts observe of tokens, a few tokens at a time."""
        ffn, length = self.ffn, h.shape[1]
        up = up if self.method.choice.needs_up else None
        padding = weight == 0
        if bool(padding.any()):  # it may hold anything, NaN too
            h = h.masked_fill(padding[..., None], 0)
            up = None if up is None else up.masked_fill(padding[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * ffn.pool))
        for start in range(0, length, step):
            some = slice(start, start + step)
            found: dict[str, Tensor | None] = {}
            if ffn.routed and any(part.slot == "choice" for part in parts):
                had = ffn.spread(present(ffn.routed, h[:, some], some, length), some, length)
                found["had"] = (weight[:, None, some] @ had).squeeze(1)
            hidden = ffn.spread(h[:, some].float(), some, length)
            up_x = None if up is None else ffn.spread(up[:, some].float(), some, length)
            found |= {part.slot: part.observe(hidden, up_x, weight[:, some]) for part in parts}
            for slot, sums in found.items():
                if sums is not None:
                    into[slot] = into[slot] + sums if slot in into else sums

    def forget(self) -> None:
        """Forget the tokens seen so far, so that no mask is made from them."""
        self.sums = {}

    @torch.no_grad()
    def finish(self, weight: Tensor) -> None:
        """The context is over, and the counts are known: make the mask, and what stands in for the rest.

        Args:
            weight: [B], what the tokens seen weigh together.
        """
        self.weight = weight
        everyone = torch.arange(len(self.kept))
        if not self.method.mask.fixed:
            self.own = self._best(self.per_token(), everyone)
        if self.method.compensation.adds and self.fitted.constant is None and bool((self.weight > 0).any()):
            self.constant = self._constant(everyone)

    def per_token(self) -> Tensor:
        """[B, pool] sums of the score; per token where sequences are compared (else order alone counts)."""
        score, sums = self.method.mask.score, self.sums["score"]
        wanted = self.shared or (score is not None and score.per_token)
        return sums / self._tokens(sums)[:, None] if wanted else sums

    def scores(self, rows: slice) -> Tensor:
        """[pool], the scores of these sequences together."""
        score = self.method.mask.score
        assert score is not None
        return score.combine(self.per_token()[rows].mean(0, keepdim=True), self.fitted.factor)[0]

    def _tokens(self, sums: Tensor) -> Tensor:
        return self.weight.clamp_min(FIRST_TOKEN).to(sums.device)

    def _best(self, sums: Tensor, rows: Tensor) -> Tensor:
        """The masks of the best neurons of the sequences `rows`. sums: [b, pool], theirs."""
        score, draw, choice = self.method.mask.score, self.method.mask.draw, self.method.choice
        assert score is not None
        number, at = self.ffn.layer, rows.cpu()
        if self.shared:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        scores = score.combine(sums, self.fitted.factor)
        if choice.ranks:
            core = draw.draw(scores, choice.core(self.taken[at]), number, score)
            self.core = core if self.core is None else self.core.index_copy(0, rows.to(core.device), core)
        return self.ffn.mask_of(lambda s, keep: draw.draw(s, keep, number, score), scores, self.kept[at])

    @property
    def mask(self) -> Tensor:
        """[B or 1, pool] bool: the neurons that each sequence may use now."""
        return self.fitted.masked if self.own is None else self.own

    def _means(self) -> Tensor | None:
        """[B or 1, pool], the means that stand in for neurons; None where there are none."""
        if self.fitted.mean is not None:
            return self.fitted.mean[None]
        sums = self.sums.get("compensation")
        return None if sums is None else sums / self._tokens(sums)[:, None]

    def _constant(self, rows: Tensor) -> Tensor:
        """[b, D] fp32, what the neurons outside the masks of these sequences add per token, on average."""
        mean, mask = self._means(), self.mask
        assert mean is not None
        mean, mask = (x[rows.to(x.device)] if len(x) > 1 else x for x in (mean, mask))
        return self.fitted.stand_in(mean.expand(len(rows), -1), mask, self.dtype)

    # -- decoded tokens --------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(
        self, h: Tensor, gate: Tensor | None = None, up: Tensor | None = None, x: Tensor | None = None,
        rows: Tensor | None = None, dense: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """h without the neurons that tokens leave out.

        Args:
            h: [B, T, F], the input of the down projection.
            gate, up: the same of act(gate x) and up x, where tokens choose; None for a plain FFN.
            x: [B, T, D], the FFN's input, where the choice reads a preview.
            rows: [K], the neurons that all of them have, where these are the mask's alone; None: all.
            dense: [B] bool, sequences that run dense now; None: none.
        """
        if rows is not None:
            kept = h.new_ones(1, 1, h.shape[-1], dtype=torch.bool)
        else:
            kept = self.ffn.of_token(self.mask.to(h.device), len(h))
        if self.fitted.chooser is not None:
            kept = self._chosen(self.fitted.chooser, h, gate, up, x, rows, kept)
        if dense is not None:
            kept = kept | dense.to(h.device)[:, None, None]
        mean = self._means() if self.method.compensation.fills else None
        if mean is not None:
            return torch.where(kept, h, mean[:, None].to(h.device, h.dtype))
        return h * kept.view(torch.uint8)  # in a quarter of the time that a CPU takes for truth values

    def _chosen(
        self, chooser: ChoiceLayer, h: Tensor, gate: Tensor | None, up: Tensor | None, x: Tensor | None,
        rows: Tensor | None, allowed: Tensor,
    ) -> Tensor:  # fmt: skip
        """The neurons of the mask that each token computes: [B, T, F] bool."""
        score = self.method.mask.score
        token = Token(
            h, h if gate is None else gate, h if up is None else up, self.context_rms(rows), x=x, rows=rows,
            allowed=allowed, taken=self.taken, written=self.written,
        )  # fmt: skip
        if self.core is not None and score is not None:
            factor = self.fitted.factor
            token.core = of_rows(self.core.to(h.device), rows)[:, None]
            factor = None if factor is None else of_rows(factor.to(h.device), rows)
            token.alone = functools.partial(alone, score, h * allowed, factor)
        kept = chooser.choose(token)
        if not self.method.choice.exact:
            self.spent = self.fitted.spent(kept.sum(-1, dtype=torch.float64).cpu())
        return kept

    def extra(self, dense: Tensor | None = None) -> Tensor | None:
        """[B, T or 1, D], what is added to down's output: constants, and what was written through a preview.

        Args:
            dense: [B] bool, sequences that run dense now, to which no constant is added; None: none.
        """
        rough = self.fitted.chooser.extra() if self.fitted.chooser is not None else None
        constant = self.fitted.constant if self.constant is None else self.constant
        if constant is None:
            return rough
        if dense is not None:
            constant = constant.masked_fill(dense.to(constant.device)[:, None], 0)
        return constant[:, None] if rough is None else rough + constant[:, None]

    def context_rms(self, rows: Tensor | None = None) -> Tensor | None:
        """[B, 1, F] fp32, root of what the choice observed, up to a factor per sequence; None: nothing.

        Of an expert the mean over the tokens that had it; where none had, as of the others' neurons on average.

        Args:
            rows: [K], the neurons that are asked for; None: all.
        """
        found = self.sums.get("choice")
        if found is None:
            return None
        if self.ffn.routed:
            had = self.sums["had"]
            found = torch.where(had > 0, found / had.clamp_min(FIRST_TOKEN), 0)
            seen = (had > 0).sum(-1, keepdim=True)
            average = torch.where(seen > 0, found.sum(-1, keepdim=True) / seen.clamp_min(1), 1)
            found = torch.where(had > 0, found, average)
        return of_rows(self.ffn.of_token(found, len(self.kept)), rows).sqrt()

    # -- new masks -------------------------------------------------------------------------------------------

    def gather(self, h: Tensor, weight: Tensor) -> None:
        """Score tokens that run dense after an alarm. h: [B, T, F]; weight: [B, T] fp32, 0 for all others."""
        assert self.fresh is not None
        into = {"score": self.fresh}
        self._add(into, [part for part in self.method.observers if part.slot == "score"], h, None, weight.to(h.device))
        self.fresh = into["score"]

    def fresh_mean(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[b, pool] scores per token of those that ran dense. rows: [b] indices; tokens: [B], how many there are."""
        assert self.fresh is not None
        at = rows.to(self.fresh.device)
        return self.fresh[at] / tokens[rows].clamp_min(1)[:, None].to(at.device)

    def clear(self, rows: Tensor) -> None:
        """Tokens of these sequences ([B] bool) begin to run dense."""
        if self.fresh is not None:
            self.fresh = self.fresh.masked_fill(rows.to(self.fresh.device)[:, None], 0.0)

    def recent(self, x: Tensor, valid: Tensor, routing: Tensor | None) -> dict[str, Tensor]:
        """What each part observes of recent tokens, per token, [b, pool] by slot.

        Args:
            x: [b, R, D], their FFN inputs. valid: [b, R] bool. routing: which experts they had, see `expert_pool`.
        """
        found: dict[str, Tensor] = {}
        with nullcontext() if self.ffn.routed is None or routing is None else under(self.ffn.routed, routing):
            a, u = self.ffn.parts(x)
            self._add(found, self.method.observers, a if u is None else a * u, u, valid.to(x.device).float())
        count = valid.to(x.device).float().sum(1, keepdim=True).clamp_min(1)
        return {slot: sums / count for slot, sums in found.items()}

    def remask(self, rows: Tensor, recent: dict[str, Tensor], blend: float, running: bool) -> list[float]:
        """New masks of some sequences, with as many neurons: scores per token, blend * old + (1 - blend) * recent.

        Args:
            rows: [b] indices. recent: see `recent`.
            running: the blended scores are the old ones of the next re-mask. Other sums always run on.

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
        if running:  # as sums again, so that a further turn of the context adds to them
            self.sums["score"] = self.sums["score"].index_copy(0, at, scores * weight)
        for slot, mean in recent.items():
            sums = self.sums[slot]
            self.sums[slot] = sums.index_copy(0, at, blend * sums[at] + (1 - blend) * mean * weight)
        if self.constant is not None:
            self.constant = self.constant.index_copy(0, at, self._constant(rows))
        return ((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist()

    def _with_old(self, recent: dict[str, Tensor], at: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Of experts that no recent token had, the old means."""
        routed = self.ffn.routed
        if routed is None:
            return {**recent}
        found = {}
        for slot, mean in recent.items():
            each = mean.view(len(mean), -1, routed.inner)
            old = (self.sums[slot][at] / weight).view_as(each)
            found[slot] = torch.where((each == 0).all(-1, keepdim=True), old, each).view_as(mean)
        return found
