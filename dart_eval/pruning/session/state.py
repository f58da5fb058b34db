"""The state of each sequence of a batch: what the parts have observed of it, its masks, its re-masks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dart_eval.layers.ffn import device_of
from dart_eval.pruning.choices.choice import Token, of_rows
from dart_eval.pruning.masks.remask import Due
from dart_eval.pruning.masks.scores import FIRST_TOKEN, alone
from dart_eval.pruning.masks.standins import constant, means
from dart_eval.pruning.session.log import Change, Step
from dart_eval.pruning.session.observed import Observed
from dart_eval.pruning.session.prepared import Prepared
from dart_eval.pruning.session.sequence import Cores


class SequenceState(Observed):
    """The state of B sequences under a method.

    Life: `observe` and `observe_change` during the context's dense forward(s), `finish_context` makes the masks; then
    `apply` prunes and `finish_decode` makes masks anew between the forwards that follow.

    Args:
        prepared: what the method has made of the model before any prompt, and for which sparsity.
        shared: all sequences have one mask, from all of them, and make it anew together.

    Attributes:
        kept, taken, written: [B, L] long, on the CPU: neurons of the mask, those of them that a token takes, those of
            these that it writes; None before the context is over.
        masks: per layer [B, F] bool; None where no sequence is pruned, and where masks are fixed.
        constants: per layer [B, D] fp32, what stands in for the neurons outside the mask.
    """

    def __init__(self, prepared: Prepared, batch: int, device: torch.device, shared: bool = False) -> None:
        super().__init__(prepared, batch, device)
        self.shared = shared
        self.kept: Tensor | None = None
        self.taken: Tensor | None = None
        self.written: Tensor | None = None
        self.masks: list[Tensor] | None = None
        self.constants: list[Tensor] | None = None
        self.cores = Cores(len(self.ffns))  # neurons of the masks that every token takes, where choices rank the others
        self.remasks = torch.zeros(batch, dtype=torch.long)
        self.spent: Tensor | None = None  # [B, T] neurons that tokens under way took, where these are not set

    def skip_context(self) -> None:
        """Begin sequences without a context. Where masks need one, they run dense and are counted as dense."""
        self._count()
        if self.method.mask.fixed:
            self._make_masks()

    def finish_context(self, valid: Tensor) -> None:
        """Close a context forward with tokens `valid` ([B, T] bool): densities, masks, the detector's reference."""
        weight, shrink = self._token_weights(valid)
        self.weight = self.weight * (1 if shrink is None else shrink) + weight.sum(1)
        self.tokens = self.tokens + valid.sum(1)
        if self.change is not None:
            self.change.finish(valid)
        if self.remasking is not None:
            self.remasking.finish(valid)
        self._count()
        self._make_masks()

    def _count(self) -> None:
        """How many neurons of each layer every sequence keeps, takes and writes."""
        rows = [slice(None)] * self.batch if self.shared else [slice(b, b + 1) for b in range(self.batch)]
        counts = []
        for row in rows:
            scores = self.prepared.scores(self.sums.get("score"), row, self._per_token)
            counts.append(self.prepared.counts(self.change, row, bool(self.tokens[row].sum() > 0), scores))
        self.kept, self.taken, self.written = (
            torch.tensor([getattr(c, name) for c in counts]) for name in ("mask", "taken", "written")
        )

    def _make_masks(self) -> None:
        everyone = torch.arange(self.batch, device=self.device)
        if not self.method.mask.fixed:
            sums = self.sums["score"]
            self.masks = [self._mask(i, self._per_token(sums[i]), everyone) for i in range(len(self.ffns))]
        if self.method.compensation.adds and self.prepared.constants is None and bool(self.tokens.any()):
            self.constants = [self._constant(i, everyone) for i in range(len(self.ffns))]

    def _per_token(self, sums: Tensor) -> Tensor:
        """[B, F] sums over the context's tokens; per token where sequences are compared (else order alone counts)."""
        score = self.method.mask.score
        wanted = self.shared or (score is not None and score.per_token)
        return sums / self.weight.clamp_min(FIRST_TOKEN)[:, None].to(sums.device) if wanted else sums

    def _mask(self, layer: int, sums: Tensor, rows: Tensor) -> Tensor:
        """The mask of the best neurons of a layer. sums: [b, F] of the sequences `rows` (indices)."""
        score = self.method.mask.score
        assert self.kept is not None and score is not None
        if self.shared:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        scores = score.combine(sums, self.prepared.factor(layer))
        draw, at, choice = self.method.mask.draw, (rows.cpu(), layer), self.method.choice
        if choice.ranks and self.taken is not None:
            self.cores.keep(layer, rows, draw.take(scores, choice.core(self.taken[at]), layer, score))
        return self.ffns[layer].take(lambda s, keep: draw.take(s, keep, layer, score), scores, self.kept[at])

    def mask(self, layer: int) -> Tensor:
        """[B or 1, F] bool: the neurons that each sequence may use now."""
        if self.masks is not None:
            return self.masks[layer]
        return self.prepared.mask(layer)

    def _constant(self, layer: int, rows: Tensor) -> Tensor:
        """What the neurons outside the masks of the sequences `rows` add per token, on average: [b, D] fp32."""
        mean, mask = self._means(layer), self.mask(layer)
        assert mean is not None
        mean, mask = (x[rows.to(x.device)] if len(x) > 1 else x for x in (mean, mask))
        return constant(self.ffns[layer], mean.expand(len(rows), -1), mask, self.dtype)

    def _means(self, layer: int) -> Tensor | None:
        """[B or 1, F] by neuron, the means that stand in for neurons; None where there are none."""
        return means(self.prepared.means, self.sums.get("compensation"), self.weight, layer)

    # -- decoding ------------------------------------------------------------------------------------------

    @property
    def prunes(self) -> bool:
        """Whether decoding forwards run pruned: not before masks, where there are any, have been made."""
        return self.kept is not None and (self.masks is not None or self.method.mask.fixed)

    @property
    def dense_now(self) -> Tensor | None:
        """[B] bool: sequences that run dense because they gather scores after an alarm; None: none ever does."""
        remasking = self.remasking
        return remasking.dense_now if remasking is not None and remasking.part.dense_tokens else None

    def step(self) -> Step:
        """What a decoding forward uses now."""
        everything = sum(f.size for f in self.ffns)
        if self.kept is None or self.taken is None or self.written is None or not self.prunes:
            return Step(*[torch.ones(self.batch, dtype=torch.float64)] * 2)
        mask = self.kept.double().sum(1) / everything
        sizes = torch.tensor([f.size for f in self.ffns]).expand_as(self.kept)
        counts = torch.stack([sizes, self.kept, self.taken, self.written]).double()
        read = (self.prepared.paid.T[:, None] * counts).sum((0, 2)) / (self.ffns[0].matrices * everything)
        if (dense := self.dense_now) is not None:
            read, mask = (torch.where(dense.cpu(), 1.0, share) for share in (read, mask))
        return Step(read, mask)

    def measured(self, valid: Tensor) -> Step | None:
        """What the forward just over used, where the sparsity does not set it: the mean over its tokens `valid`."""
        spent, self.spent = self.spent, None
        if spent is None:
            return None
        read = spent / sum(f.size for f in self.ffns)
        if (dense := self.dense_now) is not None:
            read = torch.where(dense.cpu()[:, None], 1.0, read)
        real = valid.cpu().double()
        return Step((read * real).sum(1) / real.sum(1).clamp_min(1), self.step().mask)

    def room(self) -> int | None:
        """Tokens that may run in one forward before a mask may change; None for any number."""
        return self.remasking.room() if self.remasking is not None and self.masks is not None else None

    @torch.no_grad()
    def apply(
        self, layer: int, h: Tensor, valid: Tensor, gate: Tensor | None, up: Tensor | None,
        rows: Tensor | None = None, x: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The intermediate state h without the neurons that are pruned.

        Args:
            h: [B, T, F], the input of the down projection. valid: [B, T] bool.
            gate, up: the same of act(gate x) and up x, where tokens choose; None for a plain FFN.
            rows: [K], the neurons that all of them have, where these are the mask's alone; None: all.
            x: [B, T, D], the FFN's input, where there is an image to look at it through.
        """
        choice, dense = self.method.choice, self.dense_now
        if not self.prunes or (rows is not None and not choice.chooses and dense is None):
            return h
        if dense is not None and bool(dense.any()):
            self._keep_fresh(layer, h, valid, dense)
            if bool(dense.all()):
                return h
        if rows is not None:
            kept = h.new_ones(1, 1, h.shape[-1], dtype=torch.bool)
        else:
            kept = self.ffns[layer].of_token(self.mask(layer).to(h.device), len(h))
        if choice.chooses:
            kept = self._take(layer, h, gate, up, kept, x, rows)
        if dense is not None:
            kept = kept | dense.to(h.device)[:, None, None]
        mean = self.mean(layer, h)
        # A CPU multiplies by bytes in a quarter of the time that it takes for truth values.
        return h * kept.view(torch.uint8) if mean is None else torch.where(kept, h, mean)

    def mean(self, layer: int, h: Tensor) -> Tensor | None:
        """[B, 1, F], what each neuron counts that a token leaves out; None: nothing."""
        mean = self._means(layer) if self.method.compensation.fills else None
        return None if mean is None else mean[:, None].to(h.device, h.dtype)

    def _keep_fresh(self, layer: int, h: Tensor, valid: Tensor, dense: Tensor) -> None:
        """Score the tokens of the sequences that run dense after an alarm."""
        assert self.remasking is not None
        counted = valid.to(h.device) & dense.to(h.device)[:, None]
        self.add({"score": self.remasking.fresh}, layer, h, counted, None, counted.float())

    def _take(
        self,
        layer: int,
        h: Tensor,
        gate: Tensor | None,
        up: Tensor | None,
        allowed: Tensor,
        x: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The neurons of the mask that each token computes: [B, T, F] bool."""
        choice = self.method.choice
        assert self.taken is not None and self.written is not None
        token = Token(
            h, h if gate is None else gate, h if up is None else up, self.usual(layer, rows), x=x, rows=rows,
            allowed=allowed, taken=self.taken[:, layer], written=self.written[:, layer],
        )  # fmt: skip
        score = self.method.mask.score
        if choice.ranks and score is not None:
            core, factor = self.cores[layer].to(h.device), self.prepared.factor(layer)
            token.core = of_rows(core, rows)[:, None]
            if factor is not None:
                factor = of_rows(factor.to(h.device), rows)
            token.alone = functools.partial(alone, score, h * allowed, factor)
        kept = self.prepared.choosers[layer].take(token)
        if not choice.exact:
            taken = self.prepared.spent(kept.sum(-1, dtype=torch.float64).cpu(), layer)
            self.spent = taken if self.spent is None else self.spent + taken
        return kept

    def added(self, layer: int) -> Tensor | None:
        """[B, T or 1, D], to be added to the FFN's pruned output: constants, and what was written through images."""
        rough = self.prepared.choosers[layer].extra() if self.method.choice.adds else None
        mean = self.constant(layer)
        return rough if mean is None else mean if rough is None else rough + mean

    def usual(self, layer: int, rows: Tensor | None = None) -> Tensor | None:
        """[B, 1, F] fp32, root of what the choice observed, up to a factor per sequence; None: nothing.

        Of an expert the mean over the tokens that had it; where none had, as of the others' neurons on average.

        Args:
            rows: [K], the neurons that are asked for; None: all.
        """
        sums, ffn = self.sums.get("choice"), self.ffns[layer]
        if sums is None or sums.layers[layer] is None:
            return None
        found = sums[layer]
        if ffn.routed:
            had = self.sums["had"][layer]
            found = torch.where(had > 0, found / had.clamp_min(FIRST_TOKEN), 0)
            seen = (had > 0).sum(-1, keepdim=True)
            average = torch.where(seen > 0, found.sum(-1, keepdim=True) / seen.clamp_min(1), 1)
            found = torch.where(had > 0, found, average)
        return of_rows(ffn.of_token(found, self.batch), rows).sqrt()

    def taken_by_one(self, layer: int, rows: Tensor | None) -> tuple[Tensor, int, int]:
        """Of the one sequence: what is usual of the kept neurons [K]; how many a token takes and writes."""
        ffn = self.ffns[layer]
        assert self.batch == 1 and self.taken is not None and self.written is not None
        usual = self.usual(layer, rows)
        if usual is None:  # no context came before
            usual = torch.ones(1, 1, ffn.size if rows is None else len(rows), device=device_of(ffn))
        return usual[0, 0], int(self.taken[0, layer]), int(self.written[0, layer])

    def constant(self, layer: int) -> Tensor | None:
        """[B, 1, D] fp32, to be added to the FFN's pruned output; 0 for sequences that run dense now. None: nothing."""
        constants = self.prepared.constants if self.constants is None else self.constants
        if constants is None:
            return None
        added, dense = constants[layer], self.dense_now
        return (added if dense is None else added.masked_fill(dense.to(added.device)[:, None], 0))[:, None]

    def finish_decode(self, attention: Tensor | None, valid: Tensor) -> list[Change]:
        """Close a decoding forward: ask the detector, make the masks anew that are due.

        attention: [B, T, D] attention output of the last layer, where there is a detector. valid: [B, T] bool.
        """
        if self.remasking is None:
            return []
        return [change for due in self.remasking.decoded(attention, valid, self.shared) for change in self.remask(due)]

    @torch.no_grad()
    def remask(self, due: Due) -> list[Change]:
        """Make new masks for the sequences of `due`; how many neurons a layer keeps stays.

        Scores per token, blended: w * old + (1 - w) * recent, recent being the ring's tokens, or those that ran dense
        after the alarm. What other parts observe is always a running average with the ring's tokens.
        """
        part, chosen = self.method.mask.remask, due.rows.nonzero().squeeze(1)
        assert self.masks is not None and self.remasking is not None
        w, overlaps = part.blend_of(due.cause), []
        old_weight = self.weight[chosen].clamp_min(FIRST_TOKEN)[:, None]
        for i in range(len(self.ffns)):
            at, weight = (t.to(self.masks[i].device) for t in (chosen, old_weight))
            recent = self.recent(i, chosen, due.dense)
            scores = w * self.sums["score"][i][at] / weight + (1 - w) * recent.pop("score")
            new, old = self._mask(i, scores, chosen), self.masks[i][at]
            overlaps.append(((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist())
            # New tensors, not writes: states copied with `select` may share the old ones.
            self.masks[i] = self.masks[i].index_copy(0, at, new)
            if part.old == "running":  # as sums again, so that a further turn of the context adds to them
                self.sums["score"].put(i, at, scores * weight)
            for slot, mean in recent.items():
                sums = self.sums[slot]
                sums.put(i, at, w * sums[i][at] + (1 - w) * mean * weight)
            if self.constants is not None:
                self.constants[i] = self.constants[i].index_copy(0, at, self._constant(i, chosen))
        self.remasking.moved(due)
        self.remasks[chosen.cpu()] += 1
        return [Change(row, due.cause, [layer[k] for layer in overlaps]) for k, row in enumerate(chosen.tolist())]

    def select(self, rows: Tensor) -> SequenceState:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        new = super().select(rows)
        new.batch = len(rows)
        return new
