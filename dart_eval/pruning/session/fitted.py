"""A method on one FFN before any prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.method import CostTerms, Pruner
from dart_eval.pruning.session.sequence import nbytes


@dataclass
class Fitted:
    """A method on one FFN before any prompt: the state that all sequences share.

    Attributes:
        cost_terms: read cost of a neuron, see `Pruner.cost_terms`.
        factor: [F] fp32, the score's factor that no token changes; None.
        mask: [1, pool] bool, the mask of all sequences, unless it holds every neuron; else None.
        constant: [1, D] fp32, the compensation of the neurons outside a fixed mask; None.
        threshold: the number that a neuron's importance must exceed; None if tokens take a count.
    """

    method: Pruner
    ffn: FFN
    cost_terms: CostTerms
    factor: Tensor | None = None
    mask: Tensor | None = None
    constant: Tensor | None = None
    threshold: float | None = None

    @property
    def masked(self) -> Tensor:
        """[1, pool] bool, the mask of sequences without one of their own."""
        if self.mask is not None:
            return self.mask
        return torch.ones(1, self.ffn.pool, dtype=torch.bool, device=device_of(self.ffn))

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return nbytes([self.factor, self.mask, self.constant])

    def neurons_read(self, taken: Tensor) -> Tensor:
        """Return the bytes that tokens read if they take and write this many neurons, counted in neurons."""
        always, in_mask, take, write = self.cost_terms
        return ((always + in_mask) * self.ffn.size + (take + write) * taken) / self.ffn.matrices
