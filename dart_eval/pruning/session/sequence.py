"""The base of all state that is kept for each sequence of a batch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound="PerSequence")


class PerSequence:
    """State of B sequences: every tensor in it, alone or in a list, has the batch as its first dimension.

    No row ever reads another row, so that results cannot depend on the batch's size or order. What is the same for all
    sequences (the model's layers, settings) is held as something else than a tensor or a list of tensors.
    """

    def select(self: P, rows: Tensor) -> P:
        """An independent copy for the given sequences (indices, repeats allowed)."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, _select(value, rows))
        return new

    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return nbytes(vars(self))


class Sums(PerSequence):
    """For each layer a weighted sum over the tokens seen so far, [B, F] fp32 by neuron; None before the first.

    Tensors are replaced and never written to: copies may share them.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[Tensor | None] = [None] * layers

    def add(self, layer: int, sums: Tensor) -> None:
        before = self.layers[layer]
        self.layers[layer] = sums if before is None else before + sums

    def shrink(self, layer: int, factor: Tensor) -> None:
        """Multiply what is there. factor: [B]."""
        before = self.layers[layer]
        self.layers[layer] = None if before is None else before * factor.to(before.device)[:, None]

    def put(self, layer: int, rows: Tensor, sums: Tensor) -> None:
        """Replace the sums of some sequences. rows: [b] indices, on the layer's device; sums: [b, F]."""
        self.layers[layer] = self[layer].index_copy(0, rows, sums)

    def forget(self) -> None:
        self.layers = [None] * len(self.layers)

    def __getitem__(self, layer: int) -> Tensor:
        sums = self.layers[layer]
        assert sums is not None
        return sums


class Cores(Sums):
    """For each layer the neurons of each sequence's mask that no token leaves out, [B, F] bool by neuron."""

    def keep(self, layer: int, rows: Tensor, core: Tensor) -> None:
        """Replace those of some sequences; at first there are all of them. rows: [b] indices; core: [b, F]."""
        if self.layers[layer] is None:
            self.add(layer, core)
        else:
            self.put(layer, rows.to(core.device), core)


def _select(value: Any, rows: Tensor) -> Any:
    from torch import Tensor

    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    if isinstance(value, PerSequence):
        return value.select(rows)
    if isinstance(value, list):
        return [_select(v, rows) for v in value]
    if isinstance(value, dict):
        return {k: _select(v, rows) for k, v in value.items()}
    return value


def nbytes(value: Any) -> int:
    """Bytes of tensors and of states, in lists or mappings too."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, PerSequence):
        return value.nbytes()
    if isinstance(value, (list, dict)):
        return sum(nbytes(v) for v in (value.values() if isinstance(value, dict) else value))
    return 0
