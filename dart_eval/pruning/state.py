"""What pruning keeps for each sequence of a batch: scores, masks, recent FFN inputs, the drift detector.

Every tensor has the batch as its first dimension and no row ever reads another row, so results cannot depend on
the batch's size or order. Padding is left out of every sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_eval.allocation import StageCounts, check_table, depth_aware, keep_counts, normalise_sensitivity, stage_counts
from dart_eval.ffn import FFN
from dart_eval.pruning.drift import DriftDetector
from dart_eval.pruning.masks import pick, top_k_mask
from dart_eval.pruning.method import PromptMethod
from dart_eval.pruning.ring import RingBuffer
from dart_eval.pruning.scores import decayed

CHUNK_BYTES = 64 << 20  # of fp32 activations scored at a time
FIRST_TOKEN = 1e-12  # what a token that is left out weighs: nothing beside others, all where it is alone


@dataclass(frozen=True)
class Change:
    """New masks of one sequence: `cause` is `alarm` or `steady`; `overlap` per layer, |old and new| / |old|."""

    sequence: int
    cause: str
    overlap: list[float]


class SequenceState:
    """State of B sequences under a prompt method.

    Life: `observe_*` during the context's dense forward(s), `finish_context` makes the masks; then `apply` prunes and
    `finish_decode` renews the masks between the forwards that follow.

    Args:
        ffns: layers. method: what is asked of them. sparsity: of all their weights.
        weights: per layer [F], the method's factor on a neuron's energy; None for none.
        shared: all sequences have one mask, from all of them, and renew it together.

    All of it is by neuron, whatever order the weights are in.
    """

    def __init__(
        self,
        ffns: Sequence[FFN],
        method: PromptMethod,
        sparsity: float,
        batch: int,
        device: torch.device,
        weights: Sequence[Tensor] | None = None,
        shared: bool = False,
    ) -> None:
        self.ffns, self.method, self.sparsity, self.weights = ffns, method, sparsity, weights
        self.shared = shared
        layers = len(ffns)
        self.batch, self.device = batch, device
        self.dtype = torch.float32  # of the model's activations, once seen
        self.energy: list[Tensor | None] = [None] * layers  # [B, F] fp32: weighted sum over context tokens
        self.up: list[Tensor | None] = [None] * layers  # the same sum of (up x)^2, where tokens pick neurons
        self.mean: list[Tensor | None] = [None] * layers  # the same sum of h, where its mean makes up for the pruned
        self.tokens = torch.zeros(batch, device=device)  # context tokens seen
        self.weight = torch.zeros(batch, device=device)  # the sum of their weights
        self.cosine = torch.zeros(batch, layers)  # sum over tokens of cos(y, z), on the CPU
        self.change = torch.zeros(batch, layers)  # sum over tokens of ||z - y|| / ||y||
        self.keep: Tensor | None = None  # [B, L] long, on the CPU: neurons of the mask
        self.picked: Tensor | None = None  # [B, L] long: those of them that a token picks; None: all of them
        self.written: Tensor | None = None  # [B, L] long: those of these that it writes; None: all of them
        self.masks: list[Tensor] | None = None  # L x [B, F] bool
        self.constants: list[Tensor] | None = None  # L x [B, D]: what pruned neurons add on average
        self.remasks = torch.zeros(batch, dtype=torch.long)
        self.alarms = torch.zeros(batch, dtype=torch.bool, device=device)  # raised by the last forward
        self.since = 0  # decoded tokens since the last steady renewal; the same for all, since they decode together
        self.dense_left = torch.zeros(batch, dtype=torch.long, device=device)  # tokens still to run dense
        self.fresh: list[Tensor | None] = [None] * layers  # [B, F]: scores of those tokens so far
        self.fresh_weight = torch.zeros(batch, device=device)
        drift = method.drift
        self.ring = RingBuffer(method.renewal.ring, layers) if method.needs_ring else None
        self.detector = DriftDetector(drift, batch, ffns[-1].width, device) if drift else None

    @property
    def two_stage(self) -> bool:
        """Whether tokens pick neurons inside the mask."""
        return self.method.stages > 1

    # -- context -------------------------------------------------------------------------------------------

    def _token_weights(self, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the tokens of a context forward weigh [B, T] fp32, and by how much earlier sums shrink [B]."""
        weight = valid.float()
        shrink = None
        if self.method.token_decay is not None:
            weight, shrink = decayed(weight, self.method.token_decay)
        if self.method.skips_first:
            first = valid & (valid.long().cumsum(1) + self.tokens.long()[:, None] == 1)
            weight = torch.where(first, weight * FIRST_TOKEN, weight)
        return weight, shrink

    @torch.no_grad()
    def observe_hidden(self, layer: int, h: Tensor, valid: Tensor, up: Tensor | None = None) -> None:
        """Score context tokens.

        h: [B, T, F], the input of the down projection; valid: [B, T] bool; up: [B, T, F], up x, where tokens pick.
        """
        self.dtype = h.dtype
        weight, shrink = self._token_weights(valid)
        if shrink is not None:
            for sums in (self.energy, self.up, self.mean):
                old = sums[layer]
                sums[layer] = None if old is None else old * shrink.to(old.device)[:, None]
        self._add(self.energy, layer, h, valid, weight, self.method.energy)
        if up is not None:
            self._add(self.up, layer, up, valid, weight, _squares)
        if self.method.compensate:
            self._add(self.mean, layer, h, valid, weight, _sums)

    def _add(self, sums: list[Tensor | None], layer: int, x: Tensor, valid: Tensor, weight: Tensor, of: object) -> None:
        """Add the energies of [B, T, F] values, a few tokens at a time."""
        valid, weight, total = valid.to(x.device), weight.to(x.device), sums[layer]
        if not bool(valid.all()):  # padding may hold anything, NaN too
            x = x.masked_fill(~valid[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * x.shape[0] * x.shape[2]))
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            energy = self.ffns[layer].by_neuron(of(x[:, part].float(), weight[:, part]))  # type: ignore[operator]
            total = energy if total is None else total + energy
        sums[layer] = total

    @torch.no_grad()
    def observe_change(self, layer: int, y: Tensor, z: Tensor, valid: Tensor) -> None:
        """How much the FFN changes the stream. y: residual entering it, z: what it adds; both [B, T, D]."""
        y, z, valid = y.float(), z.float(), valid.to(y.device)
        if self.method.depth_rule.residual:
            z = y + z
        cosine = cosine_similarity(y, z, dim=-1)
        change = (z - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)
        self.cosine[:, layer] += torch.where(valid, cosine, 0).sum(1).cpu()
        self.change[:, layer] += torch.where(valid, change, 0).sum(1).cpu()

    @torch.no_grad()
    def observe_attention(self, a: Tensor, valid: Tensor) -> None:
        """Feed the detector. a: [B, T, D]. The first token (a sink with outlying activations) may be left out."""
        if self.detector is None:
            return
        if self.detector.config.skip_first:
            valid = valid & (valid.long().cumsum(1) + self.tokens.long()[:, None] > 1)
        self.detector.observe(a.to(self.device), valid)

    def forget(self) -> None:
        """Leave out of the scores what was observed so far."""
        for name in ("energy", "up", "mean"):
            setattr(self, name, [None] * len(self.ffns))
        for name in ("tokens", "weight", "cosine", "change"):
            setattr(self, name, torch.zeros_like(getattr(self, name)))

    def skip_context(self) -> None:
        """Nothing came before: no mask can be made, so these sequences run dense (and are counted so)."""
        self.keep = torch.tensor([[f.size for f in self.ffns]] * self.batch)

    def finish_context(self, valid: Tensor) -> None:
        """Close a context forward with tokens `valid` ([B, T] bool): ratios, masks, reference."""
        weight, shrink = self._token_weights(valid)
        self.weight = self.weight * (1 if shrink is None else shrink) + weight.sum(1)
        self.tokens += valid.sum(1)
        if self.ring is not None:
            self.ring.advance(valid)
        if self.detector is not None:
            self.detector.set_reference()
        if self.shared:
            counts = [self._keep_counts(None)] * self.batch
        else:
            counts = [self._keep_counts(row) for row in range(self.batch)]
        self.keep = torch.tensor([c.mask for c in counts])
        if self.two_stage:
            self.picked = torch.tensor([c.picked for c in counts])
            self.written = torch.tensor([c.written for c in counts])
        self.since = 0
        self.dense_left.zero_()
        self.masks = [self._mask(i, self._per_token(e)) for i, e in enumerate(self.energy) if e is not None]
        if self.method.compensate:
            everyone = torch.arange(self.batch, device=self.device)
            self.constants = [self._constant(i, everyone) for i in range(len(self.ffns))]

    def sensitivity(self, row: int | None) -> list[float]:
        """S_l = (1 - mean cos(y, z)) * mean(||z - y|| / ||y||) of every layer for one sequence (None: for all).

        Without the rule's magnitude, the first factor alone.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        n = max(float(self.tokens[rows].sum()), 1.0)
        turn = 1 - self.cosine[rows].sum(0) / n
        return (turn * (self.change[rows].sum(0) / n) if self.method.depth_rule.magnitude else turn).tolist()

    def _keep_counts(self, row: int | None) -> StageCounts:
        """Neurons of the mask, those that a token picks and those that it writes, per layer (None: of all together)."""
        sizes = [f.size for f in self.ffns]
        if float((self.tokens if row is None else self.tokens[row]).sum()) == 0:
            # Nothing can be chosen: this sequence runs dense, and is counted so.
            return StageCounts(sizes, sizes, sizes)
        if self.method.table is not None:
            ratios = self.method.table
            check_table(ratios, self.sparsity, len(sizes))
        elif self.method.layer_allocation == "depth":
            normalised = normalise_sensitivity(self.sensitivity(row))
            ratios = depth_aware(normalised, self.sparsity, self.method.depth_rule.protect)
        else:
            ratios = [1 - self.sparsity] * len(sizes)
        if self.two_stage:
            matrices = self.ffns[0].matrices
            return stage_counts(ratios, sizes, self.sparsity, self.method.stages, matrices, self.method.down)
        counts = keep_counts(ratios, sizes, self.sparsity)
        return StageCounts(counts, counts, counts)

    def _per_token(self, sums: Tensor) -> Tensor:
        """[B, F] sums over the context's tokens; per token where sequences are compared (else order alone counts)."""
        return sums / self.weight.clamp_min(FIRST_TOKEN)[:, None].to(sums.device) if self.shared else sums

    def _mask(self, layer: int, scores: Tensor, rows: Tensor | None = None) -> Tensor:
        """The mask of the best neurons of a layer. scores: [b, F] of the sequences `rows` (indices; None: all)."""
        assert self.keep is not None
        if self.shared:
            scores = scores.mean(0, keepdim=True).expand_as(scores)
        if self.weights is not None:
            scores = scores * self.weights[layer].to(scores.device)
        keep = self.keep if rows is None else self.keep[rows.cpu()]
        return top_k_mask(scores, keep[:, layer])

    def _constant(self, layer: int, rows: Tensor) -> Tensor:
        """What the neurons outside the masks of the sequences `rows` add per token, on average: [b, D] fp32."""
        sums = self.mean[layer]
        assert sums is not None and self.masks is not None
        at = rows.to(sums.device)
        mean = sums[at] / self.weight[rows].clamp_min(FIRST_TOKEN)[:, None].to(sums.device)
        ffn = self.ffns[layer]
        return ffn.write(ffn.by_row(mean.masked_fill(self.masks[layer][at], 0)).to(self.dtype))

    # -- decoding ------------------------------------------------------------------------------------------

    @property
    def dense_now(self) -> Tensor:
        """[B] bool: sequences that run dense because they gather scores after an alarm."""
        return self.dense_left > 0

    def mask_share(self) -> Tensor:
        """[B] fp64 on the CPU: neurons of the masks in force / all neurons."""
        assert self.keep is not None
        share = self.keep.double().sum(1) / sum(f.size for f in self.ffns)
        return torch.where(self.dense_now.cpu(), 1.0, share)

    def weights_read(self) -> Tensor:
        """[B] fp64 on the CPU: FFN weights that a decoded token multiplies / all FFN weights."""
        share = self.mask_share()
        if self.picked is None:
            return share
        assert self.written is not None
        parts = [self.picked, self.written] if self.ffns[0].matrices == 3 else [self.picked]
        chosen = sum(part.double().sum(1) for part in parts) / sum(f.size for f in self.ffns)
        return torch.where(self.dense_now.cpu(), 1.0, (share + chosen) / (1 + len(parts)))

    def room(self) -> int | None:
        """Tokens that may run in one forward before a mask may change; None for any number."""
        limits = [self.detector.room()] if self.detector is not None else []
        if self.method.renewal.every:
            limits.append(self.method.renewal.every - self.since)
        if bool(self.dense_now.any()):
            limits.append(int(self.dense_left[self.dense_now].min()))
        return min(limits, default=None)

    @torch.no_grad()
    def apply(self, layer: int, h: Tensor, valid: Tensor, gate: Tensor | None = None, sliced: bool = False) -> Tensor:
        """h without the neurons that are pruned.

        h: [B, T, F], the input of the down projection; gate: [B, T, F], act(gate x), where tokens pick (of a plain FFN
        None: h itself tells). sliced: both have the mask's neurons alone, by row.
        """
        gathers = self.method.renewal.dense_tokens > 0
        if self.masks is None or (sliced and self.picked is None and not gathers):
            return h
        dense = self.dense_now.to(h.device)
        if gathers and bool(dense.any()):
            counted = valid.to(h.device) & dense[:, None]
            self._add(self.fresh, layer, h, counted, counted.float(), self.method.energy)
            if bool(dense.all()):
                return h
        kept = h.new_ones(1, 1, h.shape[-1], dtype=torch.bool) if sliced else self.masks[layer].to(h.device)[:, None]
        if self.picked is not None:
            assert self.written is not None
            score = h.float().abs() if gate is None else gate.float().abs() * self._up_norm(layer, h.shape[-1])
            kept = pick(score, kept, self.picked[:, layer])
            if self.method.down < 1 and gate is not None:
                kept = pick(h.float().abs(), kept, self.written[:, layer])
        return h * (kept | dense[:, None, None])

    def constant(self, layer: int) -> Tensor | None:
        """[B, 1, D] fp32, to be added to the FFN's pruned output; 0 for sequences that run dense now. None: nothing."""
        if self.constants is None:
            return None
        constant = self.constants[layer]
        return constant.masked_fill(self.dense_now.to(constant.device)[:, None], 0)[:, None]

    def choice(self, layer: int, kept: int) -> tuple[Tensor, int, int]:
        """For the one sequence: root of the mean square of up x of the kept neurons, by row; picked; written."""
        assert self.batch == 1 and self.picked is not None and self.written is not None
        norm = self._up_norm(layer, kept)[0, 0]
        return norm, int(self.picked[0, layer]), int(self.written[0, layer])

    def _up_norm(self, layer: int, count: int) -> Tensor:
        """[B, 1, count] root of the mean square of up x, by row, up to a factor per sequence."""
        sums = self.up[layer]
        assert sums is not None
        return self.ffns[layer].by_row(sums)[:, None, :count].sqrt()

    def finish_decode(self, attention: Tensor | None, valid: Tensor) -> list[Change]:
        """Close a decoding forward: ask the detector, renew what is due.

        attention: [B, T, D] attention output of the last layer, where there is a detector. valid: [B, T] bool.
        """
        renewal = self.method.renewal
        none = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        if self.ring is not None:
            self.ring.advance(valid)
        alarms = ended = none
        if self.detector is not None and attention is not None:
            self.alarms = self.detector.update(attention.to(self.device), valid, self.dense_now)
            if self.shared:
                self.alarms = self.alarms.any().expand_as(self.alarms)
            alarms = self.alarms if renewal.on_alarm else none
        if renewal.dense_tokens and bool(self.dense_now.any()):
            self.fresh_weight += torch.where(self.dense_now, valid.sum(1), 0)
            ran = valid.shape[1] if self.shared else valid.sum(1)  # together, ended or not
            left = (self.dense_left - ran).clamp_min(0)
            ended = self.dense_now & (left == 0)
            self.dense_left = torch.where(self.dense_now, left, self.dense_left)
        if renewal.dense_tokens and bool(alarms.any()):
            self.dense_left = self.dense_left.masked_fill(alarms, renewal.dense_tokens)
            self.fresh_weight = self.fresh_weight.masked_fill(alarms, 0.0)
            self.fresh = [None if f is None else f.masked_fill(alarms.to(f.device)[:, None], 0.0) for f in self.fresh]
            alarms = none
        due = none
        if renewal.every:
            self.since += valid.shape[1]
            if self.since >= renewal.every:
                # One mask is renewed for all; else not for sequences that ended before.
                self.since, due = 0, ~alarms if self.shared else valid[:, -1] & ~alarms
        changes = self.remask(alarms, "alarm") + self.remask(due, "steady")
        return changes + self.remask(ended, "alarm", dense=True)

    @torch.no_grad()
    def remask(self, rows: Tensor, cause: str = "alarm", dense: bool = False) -> list[Change]:
        """Make new masks for the sequences `rows` ([B] bool); their ratios stay.

        Scores per token, blended: w * old + (1 - w) * recent, recent being the ring's tokens, or those that ran
        `dense` after the alarm. The mean squares of up x, by which tokens pick, and the means of h, which make up for
        the pruned neurons, are always running averages of the ring's tokens.
        """
        if not bool(rows.any()):
            return []
        renewal = self.method.renewal
        assert self.masks is not None and self.keep is not None
        chosen = rows.nonzero().squeeze(1)
        w = renewal.blend if cause == "alarm" else renewal.every_blend
        overlaps = []
        old_weight = self.weight[chosen].clamp_min(FIRST_TOKEN)[:, None]
        for i in range(len(self.ffns)):
            energy = self.energy[i]
            assert energy is not None
            at = chosen.to(energy.device)
            recent, up, mean = self._recent(i, chosen, dense)
            scores = w * energy[at] / old_weight.to(energy.device) + (1 - w) * recent
            new = self._mask(i, scores, chosen)
            old = self.masks[i][at]
            overlaps.append(((old & new).sum(1) / old.sum(1).clamp_min(1)).tolist())
            # New tensors, not writes: states copied with `select` may share the old ones.
            self.masks[i] = self.masks[i].index_copy(0, at, new)
            if renewal.running:  # as sums again, so that a further turn of the context adds to them
                self.energy[i] = energy.index_copy(0, at, scores * old_weight.to(energy.device))
            for kind, new_mean in ((self.up, up), (self.mean, mean)):
                sums = kind[i]
                if sums is not None and new_mean is not None:
                    weight = old_weight.to(sums.device)
                    kind[i] = sums.index_copy(0, at, w * sums[at] + (1 - w) * new_mean * weight)
            if self.constants is not None:
                self.constants[i] = self.constants[i].index_copy(0, at, self._constant(i, chosen))
        if self.detector is not None and cause == "alarm" and renewal.move_reference:
            self.detector.rebase(rows)
        self.remasks[chosen.cpu()] += 1
        return [Change(row, cause, [layer[k] for layer in overlaps]) for k, row in enumerate(chosen.tolist())]

    def _recent(self, layer: int, chosen: Tensor, dense: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per-token scores [b, F] of the recent tokens of the chosen sequences, mean squares of up x, means of h."""
        if dense:
            fresh = self.fresh[layer]
            assert fresh is not None
            at = chosen.to(fresh.device)
            return fresh[at] / self.fresh_weight[chosen].clamp_min(1)[:, None].to(fresh.device), None, None
        assert self.ring is not None and self.ring.valid is not None
        x, valid = self.ring.slots[layer], self.ring.valid[chosen].float()
        assert x is not None
        a, u = self.ffns[layer].parts(x[chosen.to(x.device)])
        h, valid = (a if u is None else a * u).float(), valid.to(x.device)
        empty, count = (valid == 0)[..., None], valid.sum(1, keepdim=True).clamp_min(1)
        h = h.masked_fill(empty, 0)  # padding may hold anything, NaN too
        up = _squares(u.float().masked_fill(empty, 0), valid) / count if self.two_stage and u is not None else None
        mean = _sums(h, valid) / count if self.method.compensate else None
        by_neuron = self.ffns[layer].by_neuron
        energy = by_neuron(self.method.energy(h, valid) / count)
        return energy, None if up is None else by_neuron(up), None if mean is None else by_neuron(mean)

    def select(self, rows: Tensor) -> SequenceState:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        new = object.__new__(SequenceState)
        new.__dict__.update(self.__dict__)
        new.batch = len(rows)
        cpu = rows.cpu()

        def each(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t[rows.to(t.device)] for t in tensors]

        for name in ("energy", "up", "mean", "fresh"):
            setattr(new, name, each(getattr(self, name)))
        for name in ("masks", "constants"):
            made = getattr(self, name)
            setattr(new, name, None if made is None else each(made))
        for name in ("tokens", "weight", "dense_left", "fresh_weight", "alarms"):
            setattr(new, name, getattr(self, name)[rows.to(self.device)])
        new.cosine, new.change, new.remasks = self.cosine[cpu], self.change[cpu], self.remasks[cpu]
        new.keep = None if self.keep is None else self.keep[cpu]
        new.picked = None if self.picked is None else self.picked[cpu]
        new.written = None if self.written is None else self.written[cpu]
        new.ring = None if self.ring is None else self.ring.select(rows)
        new.detector = None if self.detector is None else self.detector.select(rows)
        return new

    def nbytes(self) -> int:
        """Bytes of everything kept for these sequences."""
        lists = [*self.energy, *self.up, *self.mean, *self.fresh, *(self.masks or []), *(self.constants or [])]
        tensors = [t for t in lists if t is not None]
        tensors += [self.cosine, self.change, self.tokens, self.weight, self.dense_left, self.fresh_weight, self.alarms]
        total = sum(t.numel() * t.element_size() for t in tensors)
        if (
            self.method.drift and self.method.renewal.dense_tokens and self.fresh[0] is None
        ):  # comes with the first alarm
            total += sum(4 * self.batch * f.size for f in self.ffns)
        if self.ring is not None:
            total += self.ring.nbytes()
        if self.detector is not None:
            total += self.detector.nbytes()
        return total


def _squares(x: Tensor, weight: Tensor) -> Tensor:
    """[B, F]: weighted sum over tokens of x^2."""
    return (weight[:, None] @ x.square()).squeeze(1)


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """[B, F]: weighted sum over tokens of x."""
    return (weight[:, None] @ x).squeeze(1)
