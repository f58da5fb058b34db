"""What a decoding forward used, and what changed after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Change:
    """New masks of one sequence: `cause` is `alarm` or `steady`; `overlap` per layer, |old and new| / |old|."""

    sequence: int
    cause: str
    overlap: list[float]


@dataclass(frozen=True)
class Step:
    """What a decoding forward uses. read: [B] FFN weights read / all of them. mask: [B] neurons in the mask / all.

    Both are fp64 on the CPU; they are equal but for methods whose tokens choose inside the mask.
    """

    read: Tensor
    mask: Tensor
