"""The values of codes, cached while memory is free: decoding takes longer than a product."""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.util import machine
from dart_eval.weights.codes import Packed

ROOM = 900_000_000  # bytes of values that are cached however little memory is free


class Decoded:
    """The values of codes or of their first bits, decoded on each call unless there is room to cache them.

    Args:
        packed: [out, in].
        dtype: of the values.
        first: bits of each code that are read; None: all.
    """

    cached_bytes = 0  # of all cached values

    def __init__(self, packed: Packed, dtype: torch.dtype, first: int | None = None) -> None:
        self.packed, self.dtype, self.first = packed, dtype, first
        self._values: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the values."""
        if self._values is not None:
            return self._values
        with torch.inference_mode(False):  # the values outlive this forward
            values = self.packed.decoded(self.dtype, self.first)
        if Decoded.cached_bytes + values.nbytes <= ROOM or (values.device.type == "cpu" and _spare(values.nbytes)):
            self._values = values
            Decoded.cached_bytes += values.nbytes
        return values

    def __del__(self) -> None:
        Decoded.cached_bytes -= 0 if self._values is None else self._values.nbytes


def _spare(size: int) -> bool:
    """Whether half of the machine's memory stays free if `size` bytes of it are taken."""
    memory = machine.memory()
    return memory is not None and memory[0] - size >= memory[1] / 2
