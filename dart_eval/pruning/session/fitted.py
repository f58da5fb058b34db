"""A method on one FFN before any prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import write_all
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.choices.choice import ChoiceLayer
from dart_eval.pruning.method import CostTerms, Pruner
from dart_eval.pruning.session.sequence import nbytes


@dataclass
class Fitted:
    """A method on one FFN before any prompt: the state that all sequences share.

    Attributes:
        cost_terms: read cost of a neuron, see `Pruner.cost_terms`.
        factor: [F] fp32, the score's factor that no token changes; None.
        mask: [1, pool] bool, the mask of all sequences, unless it holds every neuron; else None.
        mean: [pool] fp32, each neuron's mean on the calibration text, if it replaces the neuron; else None.
        constant: [1, D] fp32, the compensation of the neurons outside a fixed mask; None.
        chooser: the choice at work; None if tokens compute the whole mask.
    """

    method: Pruner
    ffn: FFN
    cost_terms: CostTerms
    factor: Tensor | None = None
    mask: Tensor | None = None
    mean: Tensor | None = None
    constant: Tensor | None = None
    chooser: ChoiceLayer | None = None

    @property
    def masked(self) -> Tensor:
        """[1, pool] bool, the mask of sequences without one of their own."""
        if self.mask is not None:
            return self.mask
        return torch.ones(1, self.ffn.pool, dtype=torch.bool, device=device_of(self.ffn))

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return nbytes([self.factor, self.mask, self.mean, self.constant])

    def neurons_read(self, taken: Tensor) -> Tensor:
        """Return the bytes that tokens read if they take and write this many neurons, counted in neurons."""
        always, in_mask, take, write = self.cost_terms
        return ((always + in_mask) * self.ffn.size + (take + write) * taken) / self.ffn.matrices

    def stand_in(self, mean: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output per token of the neurons outside masks, each at its mean: [b, D] fp32.

        Args:
            mean: [b or 1, pool] fp32.
            mask: [b or 1, pool] bool.
            dtype: of the model's activations.
        """
        left_out = torch.where(mask, 0.0, mean.to(mask.device)).to(dtype)
        routed = self.ffn.routed
        return write_all(routed, left_out).float() if routed else self.ffn.write(left_out)
