"""Codes as the kernels read them: first and last bits apart, in the order in which they are read (`kernels.c`)."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.kernels.cpu.library import COLUMNS
from dart_eval.util.bits import Rounding
from dart_eval.weights.codes import Packed

ROWS = 16  # neurons, to a multiple of which they are filled up
FIRST = 4  # bits of a code
BITS = (4, 5, 6, 8)  # of codes that are taken
PAGE, LINE = 1 << 21, 64  # bytes of a huge page, and of a line of a cache
# Which of 64 outputs of down each of 64 places holds, so that sums of 4 rows come out in order. It is its own inverse.
ORDER = torch.tensor([16 * i + 4 * lane + e for lane in range(4) for i in range(4) for e in range(4)])


def why_no_kernel(rounding: Rounding, width: int) -> str | None:
    """Return why no kernel reads rows of `width` codes, or None."""
    if rounding.by:
        return f"no kernel reads {rounding.text}"
    group = rounding.group if 0 < rounding.group < width else 0
    if rounding.k or rounding.bits not in BITS or group % COLUMNS:
        how = f"{rounding.bits} bits in groups of {rounding.group}"
        return f"the kernels read 4, 5, 6 or 8 bits in groups of {COLUMNS} or a row, not {how}"
    return None


def allocate(*shapes: Sequence[int], dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    """Return memory that a token reads from end to end, in huge pages where there are any: those are read faster."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    places = list(itertools.accumulate((-(-size // LINE) * LINE for size in sizes), initial=0))
    total = -(-places[-1] // PAGE) * PAGE
    if places[-1] >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):  # fresh pages: those that were in use before stay small
        pages = mmap.mmap(-1, total + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % PAGE :]
    else:
        memory = torch.empty(places[-1], dtype=torch.uint8)
    parts = zip(shapes, sizes, places, strict=False)
    return [memory[begin : begin + size].view(dtype).view(*shape) for shape, size, begin in parts]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack numbers of few bits, 128 to a chunk: [R, C, 128] uint8 -> [R, C, 16 bits]; the first in the lowest bits."""
    parts = values.unflatten(2, (8 // bits, 16 * bits))
    packed = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, :, place] << (bits * place)
    return packed


def split_chunks(codes: Tensor, bits: int) -> Tensor:
    """Return [R to a multiple of 16, C, 128] uint8, codes counted from 0. codes: [R, width] int8."""
    rows, width = codes.shape
    values = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    return pad(values, (0, -width % COLUMNS, 0, -rows % ROWS)).unflatten(1, (-1, COLUMNS))


def scales_of(packed: Packed) -> Tensor:
    """Return [R, groups] fp16: of chunks, or one a row.

    Raises:
        ValueError: scales that are no numbers of fp16, or offsets.
    """
    width, group = packed.codes.shape[1], packed.rounding.group
    scales = packed.scales.half()
    if packed.offsets is not None or not torch.equal(scales.float(), packed.scales.float()):
        raise ValueError("codes with offsets, or with scales of more than 16 bits")
    return scales if not 0 < group < width else scales.repeat_interleave(group // COLUMNS, 1)[:, : -(-width // COLUMNS)]


@dataclass(frozen=True)
class Codes:
    """The weights of one FFN.

    Attributes:
        neurons, width: F, D. bits: of a code.
        first, last, scales: of gate and up. dfirst, dlast, dscales: of down. All as kernels.c has them.
        step, group: see there.
    """

    neurons: int
    width: int
    bits: int
    first: Tensor
    last: Tensor
    scales: Tensor
    dfirst: Tensor
    dlast: Tensor
    dscales: Tensor
    step: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = (self.first, self.last, self.scales, self.dfirst, self.dlast, self.dscales)
        return sum(part.nbytes for part in parts)


@torch.no_grad()
def pack(gate: Packed, up: Packed, down: Packed) -> Codes:
    """Return the codes of one FFN. gate, up: [F, D]. down: [D, F]."""
    (neurons, width), bits = gate.codes.shape, gate.rounding.bits
    last_bits, padded, count = bits - FIRST, -(-neurons // ROWS) * ROWS, -(-width // COLUMNS)
    for packed in (gate, up, down):
        if (reason := why_no_kernel(packed.rounding, packed.codes.shape[1])) or packed.rounding.bits != bits:
            raise ValueError(reason or "gate, up and down have codes of different bits")
    first, last, dfirst, dlast = allocate(
        (padded // 4, count, 4, 2, 64), (padded // 4, count, 4, 2, 16 * last_bits),
        (padded // ROWS, count, ROWS, 64), (padded // ROWS, count, ROWS, 16 * last_bits),
    )  # fmt: skip
    for i, packed in enumerate((gate, up)):
        codes = split_chunks(packed.codes, bits)
        first[:, :, :, i] = pack_bits(codes >> last_bits, FIRST).unflatten(0, (-1, 4)).transpose(1, 2)
        if last_bits:
            last[:, :, :, i] = pack_bits(codes & (2**last_bits - 1), last_bits).unflatten(0, (-1, 4)).transpose(1, 2)
    both = [scales_of(gate), scales_of(up)]
    groups = max(s.shape[1] for s in both)
    stacked = torch.stack([s.expand(-1, groups) for s in both], 2)
    scales = pad(stacked, (0, 0, 0, 0, 0, padded - neurons)).unflatten(0, (-1, 4)).transpose(1, 2).contiguous()
    codes = split_chunks(down.codes.t().contiguous(), bits).unflatten(2, (2, 64))[..., ORDER].flatten(2)
    dfirst.copy_(pack_bits(codes >> last_bits, FIRST).unflatten(0, (-1, ROWS)).transpose(1, 2))
    if last_bits:
        dlast.copy_(pack_bits(codes & (2**last_bits - 1), last_bits).unflatten(0, (-1, ROWS)).transpose(1, 2))
    across = scales_of(down).t()
    dscales = pad(across, (0, count * COLUMNS - width)).contiguous()
    return Codes(
        neurons, width, bits, first, last, scales, dfirst, dlast, dscales,
        8 if groups > 1 else 0, COLUMNS if len(dscales) > 1 else 0,
    )  # fmt: skip
