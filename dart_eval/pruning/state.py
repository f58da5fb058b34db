"""What pruning keeps for each sequence of a batch: scores, masks, recent FFN inputs, the drift detector.

Every tensor has the batch as its first dimension and no row ever reads another row, so results cannot depend on
the batch's size or order. Padding is left out of every sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_eval.allocation import depth_aware, keep_counts, normalise_sensitivity
from dart_eval.ffn import FFN
from dart_eval.pruning.drift import DriftDetector
from dart_eval.pruning.method import PromptMethod

CHUNK_BYTES = 64 << 20  # of fp32 activations scored at a time


def top_k_mask(scores: Tensor, keep: Tensor) -> Tensor:
    """True for the `keep[b]` largest scores of each row; ties go to the lower index.

    scores: [B, F]; keep: [B]. Returns [B, F] bool with exactly keep[b] True in row b.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[-1], device=scores.device) < keep[:, None].to(scores.device)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


class RingBuffer:
    """The last R FFN inputs of every layer and sequence: [B, R, D] per layer, in the model's dtype.

    Slots are written in turn; their order does not matter, since scores are sums over them.
    """

    def __init__(self, size: int, layers: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * layers
        self.valid: Tensor | None = None  # [B, R] bool
        self.next = 0

    def write(self, layer: int, x: Tensor) -> None:
        """Store the last inputs of a forward. x: [B, T, D]; slots move on only with `advance`."""
        slots = self.slots[layer]
        if slots is None:
            slots = self.slots[layer] = x.new_zeros(x.shape[0], self.size, x.shape[2])
        slots.index_copy_(1, self._indices(x.shape[1], x.device), x[:, -self.size :].detach())

    def advance(self, valid: Tensor) -> None:
        """Close a forward whose tokens were `valid` ([B, T] bool), after all layers have written."""
        if self.valid is None:
            self.valid = valid.new_zeros(valid.shape[0], self.size)
        self.valid.index_copy_(1, self._indices(valid.shape[1], valid.device), valid[:, -self.size :])
        self.next = (self.next + min(valid.shape[1], self.size)) % self.size

    def _indices(self, tokens: int, device: torch.device) -> Tensor:
        return (torch.arange(min(tokens, self.size), device=device) + self.next) % self.size

    def select(self, rows: Tensor) -> RingBuffer:
        """An independent copy for the given sequences."""
        new = RingBuffer(self.size, len(self.slots))
        new.slots = [None if s is None else s[rows.to(s.device)] for s in self.slots]
        new.valid = None if self.valid is None else self.valid[rows]
        new.next = self.next
        return new

    def nbytes(self) -> int:
        tensors = [t for t in [*self.slots, self.valid] if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


class SequenceState:
    """State of B sequences under a prompt method.

    Life: `observe_*` during the context's dense forward(s), `finish_context` makes the masks, `monitor` and
    `remask` renew them between the forwards that follow.
    """

    def __init__(
        self, ffns: Sequence[FFN], method: PromptMethod, sparsity: float, batch: int, device: torch.device
    ) -> None:
        self.ffns, self.method, self.sparsity = ffns, method, sparsity
        layers = len(ffns)
        self.batch, self.device = batch, device
        self.energy: list[Tensor | None] = [None] * layers  # [B, F] fp32: sum over context tokens
        self.tokens = torch.zeros(batch, device=device)  # context tokens seen
        self.cosine = torch.zeros(batch, layers)  # sum over tokens of cos(y, z), on the CPU
        self.change = torch.zeros(batch, layers)  # sum over tokens of ||z - y|| / ||y||
        self.keep: Tensor | None = None  # [B, L] long, on the CPU
        self.masks: list[Tensor] | None = None  # L x [B, F] bool
        self.remasks = torch.zeros(batch, dtype=torch.long)
        drift = method.drift
        self.ring = RingBuffer(method.remask.ring, layers) if drift else None
        self.detector = DriftDetector(drift, batch, ffns[-1].width, device) if drift else None

    # -- context -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe_hidden(self, layer: int, h: Tensor, valid: Tensor) -> None:
        """Score context tokens. h: [B, T, F], the input of the down projection; valid: [B, T] bool."""
        valid = valid.to(h.device)
        if not bool(valid.all()):  # padding may hold anything, NaN too
            h = h.masked_fill(~valid[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * h.shape[2]))
        total = self.energy[layer]
        for start in range(0, h.shape[1], step):
            part = slice(start, start + step)
            energy = self.method.energy(h[:, part].float(), valid[:, part].float())
            total = energy if total is None else total + energy
        self.energy[layer] = total

    @torch.no_grad()
    def observe_change(self, layer: int, y: Tensor, z: Tensor, valid: Tensor) -> None:
        """How much the FFN changes the stream. y: residual entering it, z: what it adds; both [B, T, D]."""
        y, z, valid = y.float(), z.float(), valid.to(y.device)
        cosine = cosine_similarity(y, z, dim=-1)
        change = (z - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)
        self.cosine[:, layer] += torch.where(valid, cosine, 0).sum(1).cpu()
        self.change[:, layer] += torch.where(valid, change, 0).sum(1).cpu()

    @torch.no_grad()
    def observe_attention(self, a: Tensor, valid: Tensor) -> None:
        """Feed the detector. a: [B, T, D]. The first token (a sink with outlying activations) is left out."""
        if self.detector is None:
            return
        position = valid.long().cumsum(1) + self.tokens.long()[:, None]
        self.detector.observe(a.to(self.device), valid & (position > 1))

    def skip_context(self) -> None:
        """Nothing came before: no mask can be made, so these sequences run dense (and are counted so)."""
        self.keep = torch.tensor([[f.size for f in self.ffns]] * self.batch)

    def finish_context(self, valid: Tensor) -> None:
        """Close a context forward with tokens `valid` ([B, T] bool): ratios, masks, reference."""
        self.tokens += valid.sum(1)
        if self.ring is not None:
            self.ring.advance(valid)
        if self.detector is not None:
            self.detector.set_reference()
        self.keep = torch.tensor([self._keep_counts(row) for row in range(self.batch)])
        self._make_masks([e for e in self.energy if e is not None])

    def sensitivity(self, row: int) -> list[float]:
        """S_l = (1 - mean cos(y, z)) * mean(||z - y|| / ||y||) of every layer for one sequence.

        Without the rule's magnitude, the first factor alone.
        """
        n = max(float(self.tokens[row]), 1.0)
        turn = 1 - self.cosine[row] / n
        return (turn * (self.change[row] / n) if self.method.depth_rule.magnitude else turn).tolist()

    def _keep_counts(self, row: int) -> list[int]:
        sizes = [f.size for f in self.ffns]
        if float(self.tokens[row]) == 0:
            return sizes  # nothing seen, so nothing can be chosen: this sequence runs dense, and is counted so
        if self.method.layer_allocation == "depth":
            normalised = normalise_sensitivity(self.sensitivity(row))
            ratios = depth_aware(normalised, self.sparsity, self.method.depth_rule.protect)
        else:
            ratios = [1 - self.sparsity] * len(sizes)
        return keep_counts(ratios, sizes, self.sparsity)

    def _make_masks(self, scores: list[Tensor]) -> None:
        assert self.keep is not None
        self.masks = [top_k_mask(s, self.keep[:, i]) for i, s in enumerate(scores)]

    # -- decoding ------------------------------------------------------------------------------------------

    def density(self) -> Tensor:
        """[B] fp64 on the CPU: kept neurons / all neurons under the masks in force."""
        assert self.keep is not None
        return self.keep.double().sum(1) / sum(f.size for f in self.ffns)

    def monitor(self, a: Tensor, valid: Tensor) -> Tensor:
        """Close a decoding forward. a: [B, T, D] attention output; returns [B] bool, the alarms raised."""
        assert self.ring is not None and self.detector is not None
        self.ring.advance(valid)
        return self.detector.update(a.to(self.device), valid)

    @torch.no_grad()
    def remask(self, rows: Tensor) -> None:
        """Make new masks for the sequences `rows` ([B] bool) from the ring buffer; their ratios stay.

        Scores per token, blended: w * prompt + (1 - w) * recent.
        """
        assert (
            self.ring is not None and self.masks is not None and self.keep is not None and self.ring.valid is not None
        )
        chosen = rows.nonzero().squeeze(1)
        w = self.method.remask.blend
        valid = self.ring.valid[chosen].float()
        for i, ffn in enumerate(self.ffns):
            x, energy = self.ring.slots[i], self.energy[i]
            assert x is not None and energy is not None
            at = chosen.to(x.device)
            h = ffn.intermediate(x[at]).float()
            recent = self.method.energy(h, valid.to(h.device)) / valid.sum(1, keepdim=True).clamp_min(1).to(h.device)
            prompt = energy[at] / self.tokens[chosen].clamp_min(1)[:, None].to(h.device)
            new = top_k_mask(w * prompt + (1 - w) * recent, self.keep[chosen.cpu(), i])
            # A new tensor, not a write: states copied with `select` may share the old one.
            self.masks[i] = self.masks[i].index_copy(0, at, new)
        if self.detector is not None:
            self.detector.rebase(rows)
        self.remasks[chosen.cpu()] += 1

    def select(self, rows: Tensor) -> SequenceState:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        new = object.__new__(SequenceState)
        new.__dict__.update(self.__dict__)
        new.batch = len(rows)
        cpu = rows.cpu()
        new.energy = [None if e is None else e[rows.to(e.device)] for e in self.energy]
        new.masks = None if self.masks is None else [m[rows.to(m.device)] for m in self.masks]
        new.tokens = self.tokens[rows.to(self.tokens.device)]
        new.cosine, new.change, new.remasks = self.cosine[cpu], self.change[cpu], self.remasks[cpu]
        new.keep = None if self.keep is None else self.keep[cpu]
        new.ring = None if self.ring is None else self.ring.select(rows)
        new.detector = None if self.detector is None else self.detector.select(rows)
        return new

    def nbytes(self) -> int:
        """Bytes of everything kept for these sequences."""
        tensors = [
            *(e for e in self.energy if e is not None),
            *(self.masks or []),
            self.cosine,
            self.change,
            self.tokens,
        ]
        total = sum(t.numel() * t.element_size() for t in tensors)
        if self.ring is not None:
            total += self.ring.nbytes()
        if self.detector is not None:
            total += self.detector.nbytes()
        return total
