"""A gated FFN of 8-bit codes of which a token reads more bits of the columns that matter more (`columns.h`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import ACTS, BLOCK, Columns, Matrix, call
from dart_eval.kernels.cpu.packing import ORDER, allocate, scales_of
from dart_eval.weights.codes import Packed

BITS, PLANES, GROUP = 8, 4, 128
LEVELS = (0, 2, 4, 6, 8)
HALF, QUARTER = 128, 64  # rows
ROOM = 160  # as in kernels.c


class ColumnsMatrix:
    """A matrix as planes of 2 bits, and what a token reads of it.

    Args:
        packed: [out, n], codes of 8 bits in groups of 128 or a row.
        gains: what each plane of a column saves, never rising (`Levels.gains`).
        bits: of codes, that a token reads of a row.
    """

    def __init__(self, packed: Packed, gains: Sequence[float], bits: int) -> None:
        self.rows, self.width = packed.shape
        group = min(packed.rounding.group or GROUP, GROUP)
        groups = -(-self.width // group)
        self.planes, self.scales = _planes(packed.codes, group), _scales(packed, groups)
        ints, small = torch.int32, torch.int8
        self.work = {
            "scratch": torch.zeros(PLANES, self.width), "unit": torch.zeros(groups), "offset": torch.zeros(groups),
            "list": torch.zeros(groups, ROOM, dtype=ints), "ends": torch.zeros(groups, PLANES, dtype=ints),
            "high": torch.zeros(groups, ROOM, dtype=small), "low": torch.zeros(groups, ROOM, dtype=small),
            "level": torch.zeros(self.width, dtype=torch.uint8),
        }  # fmt: skip
        lines = [(slope / 2**low, start) for low in (4, 2) for slope, start in (packed.line(low),)]
        slopes = [0.0, 1.0, *(slope for slope, _ in lines), 1.0]  # by planes; of one and of all they are whole codes
        starts = [0.0, -128.0, *(start / slope for slope, start in lines), -128.0]
        self.job = Matrix(-(-self.rows // HALF) * HALF, self.width, group, groups, bits // 2)
        self.job.slope, self.job.start = type(self.job.slope)(*slopes), type(self.job.start)(*starts)
        self.job.gain[:] = gains
        self.job.table[:4] = [int(mean) + 128 for mean in packed.means(BITS - 2)]
        for name, tensor in {"planes": self.planes, "scales": self.scales, **self.work}.items():
            setattr(self.job, name, tensor.data_ptr())

    @property
    def level(self) -> Tensor:
        """[n], the planes that the last token read of each column."""
        return self.work["level"]

    @property
    def bytes_read(self) -> int:
        """Bytes that a token reads."""
        return self.job.steps * self.job.rows // 4 + self.scales.nbytes


def matrix_bytes(rows: int, width: int, group: int) -> int:
    """Return the bytes of a `ColumnsMatrix`, and of what a product works in. group: as of its codes; 0: a row."""
    rows, groups = -(-rows // HALF) * HALF, -(-width // min(group or GROUP, GROUP))
    work = width * (4 * PLANES + 1) + groups * (8 + 6 * ROOM + 4 * PLANES)
    return rows * (width + 2 * groups) + work


class ColumnsFFN:
    """An FFN of such matrices. matrices: gate, up, down. act: one of `ACTS`. level: as of `CodedFFN`."""

    def __init__(self, matrices: Sequence[ColumnsMatrix], act: str = "silu", level: str | None = None) -> None:
        self._level = build.level(level)
        self.matrices = matrices
        self._jobs = (Matrix * 3)(*(matrix.job for matrix in matrices))
        self._job = Columns(self._jobs, None, None, None, ACTS.index(act), matrices[0].width)

    @property
    def bytes_read(self) -> int:
        """Bytes that a token reads."""
        return sum(matrix.bytes_read for matrix in self.matrices)

    def __call__(self, x: Tensor) -> Tensor:
        """[1, D] -> [1, D]."""
        return call(self._job, x, self._level)


def _planes(codes: Tensor, group: int) -> Tensor:
    """[out, n] int8 -> bytes, as columns.h has them."""
    rows, width = codes.shape
    whole = -(-rows // HALF) * HALF
    (stored,) = allocate((whole * width,))
    full = whole // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        size = BLOCK if begin < full else HALF
        part = codes[begin : begin + size]
        part = pad((part.to(torch.int16) + 128).to(torch.uint8).T, (0, size - len(part)))  # [n, size]
        part = part.unflatten(1, (-1, QUARTER))[..., ORDER]  # [n, quarters, 64]
        if size == HALF:
            part = part.unflatten(2, (2, 32)).flatten(1, 2)  # [n, 4, 32]
        planes = [sum((part[:, q] >> 6 - 2 * p & 3) << 2 * q for q in range(4)) for p in range(PLANES)]
        at = begin * width
        for planes_of_group in zip(*(plane.split(group) for plane in planes), strict=True):
            content = torch.stack(planes_of_group).flatten()
            stored[at : at + len(content)] = content
            at += len(content)
    return stored


def _scales(packed: Packed, groups: int) -> Tensor:
    """Bytes of fp16 scales, as columns.h has them."""
    scales = scales_of(packed).expand(-1, groups)
    scales = pad(scales, (0, 0, 0, -len(scales) % HALF))
    return torch.cat([part.T.flatten() for part in scales.split(BLOCK)])
