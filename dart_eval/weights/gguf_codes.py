"""The codes of GGUF's types on an even grid.

The gguf package expands blocks to weights and returns no codes. So the scales in a copy of the blocks are set to 1 and
their minima to 0, and the package then expands the codes themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Type: bits of a code, weights that share a scale, and whether codes begin at 0.
GRIDS = {
    "Q4_0": (4, 32, False), "Q5_0": (5, 32, False), "Q8_0": (8, 32, False), "Q2_K": (2, 16, True),
    "Q3_K": (3, 16, False), "Q4_K": (4, 32, True), "Q5_K": (5, 32, True), "Q6_K": (6, 16, False),
}  # fmt: skip
ONE, ZERO = b"\x00\x3c", b"\x00\x00"  # as floats of 16 bits
_K = ONE + ZERO + b"\1" * 4 + b"\0" * 4 + b"\1" * 4  # d, dmin, and eight scales of 1 and minima of 0, 6 bits each
# Type: bytes of a block, and the bytes by offset that make a weight equal its code.
UNIT: dict[str, tuple[int, dict[int, bytes]]] = {
    "Q4_0": (18, {0: ONE}), "Q5_0": (22, {0: ONE}), "Q8_0": (34, {0: ONE}),
    "Q2_K": (84, {0: b"\1" * 16, 80: ONE + ZERO}),  # a nibble of scale, one of minimum
    "Q3_K": (110, {96: b"\x11" * 8 + b"\xaa" * 4 + ONE}),  # scales of 6 bits, less 32: 33
    "Q4_K": (144, {0: _K}), "Q5_K": (176, {0: _K}), "Q6_K": (210, {192: b"\1" * 16 + ONE}),
}  # fmt: skip


def reader(file: Path) -> GGUFReader:
    """Return the gguf package's reader of a file, with an error for more entries than the file has room for."""
    from gguf import GGUFReader

    class Whole(GGUFReader):
        def _get(self, offset: int, dtype: DTypeLike, count: int = 1, *args: Any, **kwargs: Any) -> np.ndarray:
            entries = super()._get(offset, dtype, count, *args, **kwargs)
            if len(entries) < int(count):
                raise ValueError(f"it ends before byte {offset + int(count) * entries.itemsize}")
            return entries

    return Whole(file)


def codes_of(raw: np.ndarray, kind: str) -> np.ndarray:
    """Return [out, in] int8, the codes of a tensor. raw: [out, bytes] uint8; kind: one of `GRIDS`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    size, parts = UNIT[kind]
    blocks = np.array(raw, dtype=np.uint8).reshape(-1, size)
    for place, data in parts.items():
        blocks[:, place : place + len(data)] = np.frombuffer(data, np.uint8)
    return dequantize(blocks.reshape(raw.shape), GGMLQuantizationType[kind]).astype(np.int8)


def write(tensors: Sequence[ReaderTensor], target: Path, wanted: re.Pattern[str]) -> None:
    """Write the codes of matrices among a file's tensors, as `layer.side`; skip experts and other types.

    Args:
        wanted: pattern of their names, with the layer and the side as groups.
    """
    codes = {}
    for tensor in tensors:
        match, kind = wanted.fullmatch(tensor.name), tensor.tensor_type.name
        if match and kind in GRIDS and len(tensor.shape) == 2:
            codes[".".join(match.groups())] = np.ascontiguousarray(codes_of(tensor.data, kind))
    save_file(codes, target)
