"""The sequences of a batch under a method: their layers, and the state that layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.masks.change import ChangeState
from dart_eval.pruning.masks.remask import RemaskState
from dart_eval.pruning.session.layer import Layer
from dart_eval.pruning.session.log import Change, Step
from dart_eval.pruning.session.prepared import Prepared
from dart_eval.pruning.session.sequence import PerSequence


class SequenceState(PerSequence):
    """B sequences under a method.

    `observe` and `observe_change` run during the context's dense forwards, and `finish_context` makes the masks. Then
    `prune` prunes, and `finish_decode` makes new masks between decoding forwards.

    Args:
        prepared: the method on the model before any prompt.
        shared: all sequences have one mask, made and re-made from all of them.

    Attributes:
        layers: the state of each FFN.
        counted: whether the counts of neurons are set.
        tokens: [B] context tokens seen.
        weight: [B], their total weight.
        remasks: [B] long, number of re-masks.
        change: how much FFNs change the stream, if the allocation needs it.
        remasking: the state of re-masks, if there are any.
    """

    def __init__(self, prepared: Prepared, batch: int, device: torch.device, shared: bool = False) -> None:
        self.prepared, self.method, self.batch, self.device, self.shared = (
            prepared, prepared.method, batch, device, shared,
        )  # fmt: skip
        ffns, remask = prepared.ffns, self.method.mask.remask
        self.counted = False
        self.tokens, self.weight = torch.zeros(batch, device=device), torch.zeros(batch, device=device)
        self.remasks = torch.zeros(batch, dtype=torch.long)
        self.layers = [Layer(fitted, self.weight, shared) for fitted in prepared.layers]
        self.change: ChangeState | None = self.method.allocation.start(batch, ffns)
        watched = remask.needs_ring or remask.watches or remask.release
        self.remasking = RemaskState(remask, ffns, batch, device) if watched else None

    # -- the context -----------------------------------------------------------------------------------------

    def observe(self, layer: int, h: Tensor, valid: Tensor) -> None:
        """Add context tokens: see `Layer.observe`. valid: [B, T] bool, False for padding."""
        self.layers[layer].observe(h, valid.float())

    @torch.no_grad()
    def observe_change(self, layer: int, y: Tensor, added: Tensor, valid: Tensor) -> None:
        """Add an FFN's change of the stream. y: the stream that enters it; added: its output, both [B, T, D]."""
        if self.change is not None:
            self.change.observe(layer, y, added, valid)

    @torch.no_grad()
    def observe_attention(self, a: Tensor, valid: Tensor) -> None:
        """Add the last layer's attention output of context tokens, [B, T, D]."""
        if self.remasking is not None:
            self.remasking.observe_attention(a, valid, self.tokens)

    def forget(self) -> None:
        """Forget what was observed so far, so that no mask is made from it."""
        for layer in self.layers:
            layer.sums = None
        self.change = self.method.allocation.start(self.batch, self.ffns)
        self.tokens, self.weight = torch.zeros_like(self.tokens), torch.zeros_like(self.weight)

    def skip_context(self) -> None:
        """Begin sequences without a context. If masks need one, they run dense and count as dense."""
        self._count()

    def finish_context(self, valid: Tensor) -> None:
        """Close a context forward with tokens `valid` ([B, T] bool): densities, masks, the detector's reference."""
        self.tokens, self.weight = self.tokens + valid.sum(1), self.weight + valid.sum(1)
        if self.change is not None:
            self.change.finish(valid)
        if self.remasking is not None:
            self.remasking.finish(valid)
        for layer in self.layers:
            layer.weight = self.weight  # the counts may depend on scores per token
        self._count()
        for layer in self.layers:
            layer.finish()

    def _count(self) -> None:
        """Set the number of neurons of each layer that every sequence keeps, takes and writes."""
        counts, by_scores = [], self.method.allocation.needs_scores and self.layers[0].sums is not None
        for row in [slice(None)] * self.batch if self.shared else [slice(b, b + 1) for b in range(self.batch)]:
            scores = [layer.scores(row) for layer in self.layers] if by_scores else None
            counts.append(self.prepared.counts(self.change, row, bool(self.tokens[row].sum() > 0), scores))
        for i, layer in enumerate(self.layers):
            layer.mask_counts, layer.taken, layer.written = (
                torch.tensor([of_layers[i] for of_layers in column])
                for column in zip(*((c.mask, c.taken, c.written) for c in counts), strict=True)
            )
        self.counted = True

    # -- current state ---------------------------------------------------------------------------------------

    @property
    def ffns(self) -> tuple[FFN, ...]:
        """The FFNs of the model."""
        return tuple(layer.ffn for layer in self.layers)

    @property
    def masks(self) -> list[Tensor] | None:
        """Per layer [B, pool] bool; None if no sequence has a mask of its own."""
        own = [layer.own for layer in self.layers if layer.own is not None]
        return own or None

    @property
    def masked(self) -> bool:
        """Whether the sequences have masks of their own."""
        return self.layers[0].own is not None

    @property
    def mask_counts(self) -> Tensor:
        """[B, L] long, neurons of each layer's mask."""
        return torch.stack([layer.mask_counts for layer in self.layers], 1)

    @property
    def taken(self) -> Tensor:
        """[B, L] long, neurons of the mask that a token takes."""
        return torch.stack([layer.taken for layer in self.layers], 1)

    @property
    def written(self) -> Tensor:
        """[B, L] long, taken neurons that a token writes."""
        return torch.stack([layer.written for layer in self.layers], 1)

    @property
    def prunes(self) -> bool:
        """Whether decoding forwards run pruned: not before masks have been made, nor after they are released."""
        return self._has_masks and not self.released

    @property
    def _has_masks(self) -> bool:
        return self.counted and (self.masked or self.method.mask.fixed)

    @property
    def released(self) -> bool:
        """Whether tokens run dense since their masks are released, see `RemaskState`."""
        return self.remasking is not None and self.remasking.released

    @property
    def dense_now(self) -> Tensor | None:
        """[B] bool, the sequences that run dense to gather scores after an alarm; None if none ever does."""
        remasking = self.remasking
        return remasking.dense_now if remasking is not None and remasking.part.dense_tokens else None

    def step(self, pruned: bool = False) -> Step:
        """Return the weights that a decoding forward uses now.

        Args:
            pruned: as if no sequence ran dense after an alarm, and no masks were released.
        """
        if not (self._has_masks if pruned else self.prunes):
            return Step(*[torch.ones(self.batch, dtype=torch.float64)] * 2)
        in_mask, everything = self.mask_counts, sum(f.size for f in self.ffns)
        mask = in_mask.double().sum(1) / everything
        sizes = torch.tensor([f.size for f in self.ffns]).expand_as(in_mask)
        counts = torch.stack([sizes, in_mask, self.taken, self.written]).double()
        terms = torch.tensor([layer.fitted.cost_terms for layer in self.layers], dtype=torch.float64)
        read = (terms.T[:, None] * counts).sum((0, 2)) / (self.ffns[0].matrices * everything)
        if (dense := self.dense_now) is not None and not pruned:
            read, mask = (torch.where(dense.cpu(), 1.0, share) for share in (read, mask))
        if self.method.needs_context:  # without one, tokens run dense
            read, mask = (torch.where(self.tokens.cpu() > 0, share, 1.0) for share in (read, mask))
        return Step(read, mask)

    def measured(self, valid: Tensor) -> Step | None:
        """Return the weights that the last forward used, mean over tokens `valid`; None if the sparsity sets them."""
        if self.method.exact:
            return None
        counts = [layer.neurons_read for layer in self.layers if layer.neurons_read is not None]
        for layer in self.layers:
            layer.neurons_read = None
        if not counts:
            return None
        read = torch.stack(counts).sum(0) / sum(f.size for f in self.ffns)
        real = valid.cpu().double()
        return Step((read * real).sum(1) / real.sum(1).clamp_min(1), self.step().mask)

    def room(self) -> int | None:
        """Return the tokens that may run in one forward before a mask may change; None for any number."""
        return self.remasking.room() if self.remasking is not None and self.masked else None

    # -- decoded tokens --------------------------------------------------------------------------------------

    def prune(
        self, layer: int, h: Tensor, going: Tensor, gate: Tensor | None = None, up: Tensor | None = None
    ) -> Tensor:
        """Return h of a layer without its pruned neurons: see `Layer.prune`. going: [B, T] bool, not yet ended."""
        one, dense = self.layers[layer], self.dense_now
        if not self.prunes:
            return h
        if dense is not None and bool(dense.any()):
            one.gather(h, (going & dense[:, None]).float())
            if bool(dense.all()):
                return h
        return one.prune(h, gate, up, dense)

    def finish_decode(self, attention: Tensor | None, valid: Tensor) -> list[Change]:
        """Close a decoding forward: run the detector, and make the new masks that are due.

        Args:
            attention: [B, T, D] attention output of the last layer, if there is a detector.
            valid: [B, T] bool.
        """
        if self.remasking is None:
            return []
        due = self.remasking.decoded(attention, valid, self.shared)
        if bool((begins := self.remasking.to_be_dense).any()):
            for layer in self.layers:
                layer.clear(begins)
        return self.remask(due) if bool(due.any()) else []

    @torch.no_grad()
    def remask(self, due: Tensor) -> list[Change]:
        """Make new masks for the sequences `due` ([B] bool), with as many neurons as before.

        The recent tokens come from the ring, or ran dense after the alarm.
        """
        remasking, part = self.remasking, self.method.mask.remask
        assert remasking is not None
        rows, overlaps = due.nonzero().squeeze(1), []
        for layer in self.layers:
            if part.dense_tokens:
                recent = layer.fresh_mean(rows, remasking.fresh_tokens)
            else:
                recent = layer.recent(*remasking.inputs(layer.ffn, rows))
            overlaps.append(layer.remask(rows, recent, part.blend))
        remasking.moved(due)
        self.remasks[rows.cpu()] += 1
        return [Change(row, [layer[k] for layer in overlaps]) for k, row in enumerate(rows.tolist())]

    def select(self, rows: Tensor) -> SequenceState:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        new = super().select(rows)
        new.batch = len(rows)
        for layer in new.layers:
            layer.weight = new.weight
        return new
