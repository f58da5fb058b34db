"""All that belongs to the sequences of a batch, batch first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN

P = TypeVar("P", bound="PerSequence")


class PerSequence:
    """State of B sequences: every tensor in it, alone or in a list, has the batch as its first dimension.

    No row ever reads another row, so that results cannot depend on the batch's size or order. State that all sequences
    share (the model's layers, settings) must not be a tensor or a list of tensors.
    """

    def select(self: P, index: Tensor) -> P:
        """Return an independent copy for the given sequences (indices, repeats allowed)."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, _select(value, index))
        return new

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return nbytes(vars(self))


def _select(value: object, index: Tensor) -> object:
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, PerSequence):
        return value.select(index)
    if isinstance(value, list):
        return [_select(v, index) for v in value]
    if isinstance(value, (dict, tuple)) and nbytes(value):
        raise TypeError("tensors of sequences stand alone or in lists")
    return value


def nbytes(value: object) -> int:
    """Return the bytes of tensors and states, in lists or mappings too. A tensor counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(value)}.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PerSequence):
        yield from _tensors(vars(value))
    elif isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


class Rows(PerSequence):
    """B sequences under a method, which may add attributes of its own in `Method.begin`.

    Args:
        ffns: of the model.
        shared: all sequences have one mask, made and re-made from all of them.

    Attributes:
        seen: [B] long, tokens of the context.
        sums: per layer [B, pool] fp32, what `Method.observe` gave for them; None before any.
        mask: per layer [B, pool] bool, the neurons that each sequence may use; empty before there are masks.
        counts: [B, L, 3] long, on the CPU: neurons in the mask, taken by a token and written by it.
        remasks: [B] long, re-masks so far.
    """

    def __init__(self, batch: int, ffns: Sequence[FFN], device: torch.device, shared: bool = False) -> None:
        self.shared = shared
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)
        self.sums: list[Tensor | None] = [None] * len(ffns)
        self.mask: list[Tensor] = []
        self.counts = torch.tensor([[f.size] * 3 for f in ffns]).repeat(batch, 1, 1)
        self.remasks = torch.zeros(batch, dtype=torch.long)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # of the method
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __len__(self) -> int:
        return len(self.seen)

    @property
    def together(self) -> list[Tensor]:
        """[b] indices of the sequences that get one mask together: each alone, or all where they share it."""
        each = torch.arange(len(self))
        return [each] * len(self) if self.shared else list(each.split(1))

    def per_token(self) -> list[Tensor]:
        """Return the sums per layer, [B, pool]; per token where sequences are compared (else only the order counts)."""
        sums = [s for s in self.sums if s is not None]
        return [s / self.tokens(s) for s in sums] if self.shared else sums

    def tokens(self, like: Tensor) -> Tensor:
        """Return [B, 1], the tokens of the context, at least 1, on the device of a tensor."""
        return self.seen.clamp_min(1).to(like.device)[:, None]
