"""The base of all state per sequence of a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound="PerSequence")


class PerSequence:
    """State of B sequences: every tensor in it, alone or in a list, has the batch as its first dimension.

    No row ever reads another row, so that results cannot depend on the batch's size or order. State that all sequences
    share (the model's layers, settings) must not be a tensor or a list of tensors.
    """

    def select(self: P, rows: Tensor) -> P:
        """Return an independent copy for the given sequences (indices, repeats allowed)."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, _select(value, rows))
        return new

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return nbytes(vars(self))


def _select(value: object, rows: Tensor) -> object:
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


def nbytes(value: object) -> int:
    """Return the bytes of tensors and states, in lists or mappings too. A tensor counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(value)}.values())


def _tensors(value: object) -> Iterator[Tensor]:
    from torch import Tensor

    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PerSequence):
        yield from _tensors(vars(value))
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
