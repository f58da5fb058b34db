"""A method on one FFN before any prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_eval.layers.expert_pool import write_all
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.choices.choice import WHOLE, ChoiceLayer
from dart_eval.pruning.method import CostTerms, Pruner
from dart_eval.pruning.session.sequence import nbytes

# By matrix (None for neurons): the cost of each level in neurons, fp64, and per forward the levels [B, T, n] uint8.
Noted = dict[object, tuple[Tensor, list[Tensor]]]


@dataclass
class Fitted:
    """A method on one FFN before any prompt: the state that all sequences share.

    Attributes:
        cost_terms: read cost of a neuron, see `Pruner.cost_terms`.
        factor: [F] fp32 (or several such rows), the score's factor that no token changes; None.
        mask: [1, pool] bool, the mask of all sequences, unless it holds every neuron; else None.
        mean: [pool] fp32, each neuron's mean on the calibration text, if it replaces the neuron; else None.
        constant: [1, D] fp32, the compensation of the neurons outside a fixed mask; None.
        chooser: the choice at work; None if tokens compute the whole mask.
        noted: what decoded tokens read, see `note`; None while nothing is noted.
    """

    method: Pruner
    ffn: FFN
    cost_terms: CostTerms
    factor: Tensor | None = None
    mask: Tensor | None = None
    mean: Tensor | None = None
    constant: Tensor | None = None
    chooser: ChoiceLayer | None = None
    noted: Noted | None = None

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

    def note(self, levels: Tensor, costs: Callable[[], Sequence[float]], matrix: object = None) -> None:
        """Note how much tokens read of each neuron or column, if asked (`SessionStats.noting`).

        Args:
            levels: [B, T, n], from 0. A higher level reads what a lower one reads, and more.
            costs: returns the bytes of a neuron or column at each level, in neurons.
            matrix: of the columns.
        """
        if self.noted is not None:
            if matrix not in self.noted:
                self.noted[matrix] = torch.tensor(costs(), dtype=torch.float64), []
            self.noted[matrix][1].append(levels.to("cpu", torch.uint8))

    def note_neurons(self, levels: Callable[[], Tensor], dense: Tensor | None = None) -> None:
        """Note how much tokens read of each neuron, if asked.

        Args:
            levels: returns [B, T, F], see `AnyChoice.levels`.
            dense: [B] bool, sequences that run dense now; None: none.
        """
        if self.noted is None or self.method.other is not None:
            return
        always, in_mask, taken, written = self.cost_terms
        more = (written, taken) if self.method.choice.adds else (taken, written)
        costs = [cost / self.ffn.matrices for cost in itertools.accumulate((always, in_mask, *more))]
        found = levels()
        whole = found if dense is None else found.masked_fill(dense.to(found.device)[:, None, None], WHOLE)
        self.note(whole, lambda: costs)
