"""The last FFN inputs of every layer, from which new masks are made, whatever the old masks pruned."""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.pruning.rows import PerSequence


class RingBuffer(PerSequence):
    """The last R FFN inputs of every layer and sequence: [B, R, D] per layer, in the model's dtype.

    A sequence's slots are written in turn by its own real tokens alone, so its contents do not depend on the batch.
    """

    def __init__(self, size: int, layers: int) -> None:
        self.size = size
        self.slots: list[Tensor | None] = [None] * layers
        self.valid: Tensor | None = None  # [B, R] bool
        self.next: Tensor | None = None  # [B] long, the slot to write; a tensor, for compilers

    def write(self, layer: int, x: Tensor, valid: Tensor) -> None:
        """Store the inputs of a forward's real tokens. The slots move on with `advance`.

        x: [B, T, D]; valid: [B, T] bool.
        """
        slots = self.slots[layer]
        if slots is None:
            slots = self.slots[layer] = x.new_zeros(x.shape[0], self.size, x.shape[2])
        if self.next is None:
            self.next = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        x = x.detach() if x.requires_grad else x
        start = self.next if self.next.device == x.device else self.next.to(x.device)
        if x.shape[1] > 1:
            rows, at, to = self._places(valid.to(x.device), start)
            slots[rows, to] = x[rows, at]
        elif x.shape[0] == 1:
            slots.index_copy_(1, start, x)
        else:
            index = start[:, None, None].expand(-1, 1, x.shape[2])
            slots.scatter_(1, index, torch.where(valid.to(x.device)[..., None], x, slots.gather(1, index)))

    def _places(self, valid: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row, place in the forward and slot of each sequence's last R real tokens."""
        count = valid.long().cumsum(1)
        stored = valid & (count > count[:, -1:] - self.size)
        rows, at = stored.nonzero(as_tuple=True)
        return rows, at, (start[rows] + count[rows, at] - 1) % self.size

    def __getitem__(self, layer: int) -> Tensor:
        """[B, R, ...], the stored inputs of a layer."""
        slots = self.slots[layer]
        assert slots is not None
        return slots

    def advance(self, valid: Tensor) -> None:
        """Close a forward whose real tokens were `valid` ([B, T] bool), after all layers have written."""
        if self.valid is None:
            self.valid = valid.new_zeros(valid.shape[0], self.size)
        if self.next is None:
            self.next = torch.zeros(valid.shape[0], dtype=torch.long, device=valid.device)
        start = self.next.to(valid.device)
        if valid.shape[1] > 1:
            rows, _, to = self._places(valid, start)
            self.valid[rows, to] = True
        else:
            self.valid.scatter_(1, start[:, None], self.valid.gather(1, start[:, None]) | valid)
        self.next.copy_((start + valid.sum(1)) % self.size)
