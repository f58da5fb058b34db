"""The last FFN inputs of every layer: what new masks are made from, whatever the old masks pruned."""

from __future__ import annotations

import torch
from torch import Tensor


class RingBuffer:
    """The last R FFN inputs of every layer and sequence: [B, R, D] per layer, in the model's dtype.

    Slots are written in turn; their order does not matter, since scores are sums over them.
    """

    def __init__(self, size: int, layers: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * layers
        self.valid: Tensor | None = None  # [B, R] bool
        self.next = torch.zeros(1, dtype=torch.long)  # the slot to write; a tensor, for compilers

    def write(self, layer: int, x: Tensor) -> None:
        """Store the last inputs of a forward. x: [B, T, D]; slots move on only with `advance`."""
        slots = self.slots[layer]
        if slots is None:
            slots = self.slots[layer] = x.new_zeros(x.shape[0], self.size, x.shape[2])
            self.next = self.next.to(x.device)
        if x.shape[1] > 1:
            x = x[:, -self.size :]
        slots.index_copy_(1, self._indices(x.shape[1], x.device), x.detach() if x.requires_grad else x)

    def advance(self, valid: Tensor) -> None:
        """Close a forward whose tokens were `valid` ([B, T] bool), after all layers have written."""
        if self.valid is None:
            self.valid = valid.new_zeros(valid.shape[0], self.size)
        self.valid.index_copy_(1, self._indices(valid.shape[1], valid.device), valid[:, -self.size :])
        self.next.add_(min(valid.shape[1], self.size)).remainder_(self.size)

    def _indices(self, tokens: int, device: torch.device) -> Tensor:
        start = self.next if self.next.device == device else self.next.to(device)
        return start if tokens == 1 else (torch.arange(min(tokens, self.size), device=device) + start) % self.size

    def select(self, rows: Tensor) -> RingBuffer:
        """An independent copy for the given sequences."""
        new = RingBuffer(self.size, len(self.slots))
        new.slots = [None if s is None else s[rows.to(s.device)] for s in self.slots]
        new.valid = None if self.valid is None else self.valid[rows]
        new.next = self.next.clone()
        return new

    def nbytes(self) -> int:
        """Bytes of all slots."""
        tensors = [t for t in [*self.slots, self.valid] if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)
