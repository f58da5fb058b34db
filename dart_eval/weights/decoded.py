"""The values of codes, cached while memory is free.

Decoded values take twice the bytes of the codes or more. They are cached up to `ROOM`, and beyond that in a CPU's
memory while half of it stays free: decoding takes longer than a product.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from dart_eval.util import machine
from dart_eval.weights.codes import Packed

ROOM = 900_000_000  # bytes of cached values, however little memory is free


class Room:
    """Bytes that are free for cached values, over all models; below 0 once the machine's spare memory is in use."""

    def __init__(self, size: int) -> None:
        self.free_bytes = size

    def reserve(self, owner: object, size: int, device: torch.device) -> bool:
        """Reserve bytes of a device until the owner is deleted; return whether there is room."""
        if size > self.free_bytes and not (device.type == "cpu" and _spare(size)):
            return False
        self.free_bytes -= size
        weakref.finalize(owner, self._back, size)
        return True

    def _back(self, size: int) -> None:
        self.free_bytes += size


def _spare(size: int) -> bool:
    """Whether half of the machine's memory stays free if `size` bytes of it are taken."""
    found = machine.memory()
    return found is not None and found[0] - size >= found[1] / 2


_ROOM = Room(ROOM)


class Decoded:
    """The values of codes or of their first bits, decoded on each call unless there is room to cache them.

    Args:
        packed: [out, in].
        dtype: of the values.
        first: bits of each code that are read; None: all.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype, first: int | None = None) -> None:
        self.packed, self.dtype, self.first = packed, dtype, first
        self._values: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the values."""
        if self._values is not None:
            return self._values
        with torch.inference_mode(False):  # the values outlive this forward
            values = self.packed.decoded(self.dtype, self.first)
        if _ROOM.reserve(self, values.nbytes, values.device):
            self._values = values
        return values
