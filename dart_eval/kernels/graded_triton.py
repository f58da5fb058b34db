"""dart-plus' FFN of one token on a GPU, in five Triton kernels: what `cpu.ffns.GradedFFN` computes, in fp32.

A token reads first bits from end to end, and whole rows of the neurons that it chooses. No number depends on the order
in which programs run: scores are compared as whole numbers, and sums are added up in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.kernels.cpu.packing import COLUMNS, FIRST, bits_of, chunks, scales_of
from dart_eval.kernels.gather import triton
from dart_eval.weights.codes import Packed

if triton is not None:
    from dart_eval.kernels import graded_kernels

BITS = (6, 8)  # of codes that are taken
LOOK, EXACT, WRITE = 4, 2, 16  # neurons that one program has at a time
CHUNKS, BESIDE = 8, 2  # of columns that one program has at a time: of gate and up, of down
SPLITS, PARTS = 16, 3  # most programs that share the neurons of a sum over columns, and sums of columns
OUT = 128  # columns of the output that one program adds up


def lacking(bits: int) -> str | None:
    """Return why codes of so many bits are not taken, or None."""
    known = " or ".join(map(str, BITS))
    return None if bits in BITS else f"the kernels for GPUs read codes of {known} bits, not {bits}"


def _parts(codes: Tensor, bits: int) -> list[Tensor]:
    """Return first bits [rows, chunks, 64] and the others [rows, chunks, 16 rest]. codes: [rows, columns] int8."""
    wide, rest = chunks(codes, bits)[: len(codes)], bits - FIRST
    return [bits_of(wide >> rest, FIRST), bits_of(wide & (2**rest - 1), rest)]


class GradedFFN:
    """As `cpu.ffns.GradedFFN`, with the same arguments and attributes, on the device of the weights.

    One token at a time: all that it works in is made once. A CUDA graph can therefore capture a call, after another one
    has compiled the kernels: no call waits for the device, and nothing is allocated but what it returns. The numbers of
    neurons are part of the graph, and a new `grade` needs a new one.
    """

    def __init__(
        self, gate: Packed, up: Packed, down: Packed, doubts: Sequence[Tensor] | Tensor, columns: Tensor, taken: int,
        coarse: int, known: float = 0.2, act: str = "silu",
    ) -> None:  # fmt: skip
        bits, device = gate.rounding.bits, gate.codes.device
        if reason := lacking(bits):
            raise ValueError(reason)
        (self.size, self.width), self.known, self.act = gate.codes.shape, known, act
        self._rest, self._count = bits - FIRST, -(-self.width // COLUMNS)
        self.lines = [held.line(self._rest) for held in (gate, up, down)]
        pairs = zip(_parts(gate.codes, bits), _parts(up.codes, bits), strict=True)
        self._first, self._next = (torch.stack(pair, 1) for pair in pairs)  # [F, gate and up, chunks, bytes]
        self._dfirst, self._dnext = _parts(down.codes.t().contiguous(), bits)
        self._scales = torch.stack(torch.broadcast_tensors(scales_of(gate), scales_of(up)), 1).contiguous()
        self._dscales = pad(scales_of(down).t(), (0, -self.width % COLUMNS)).contiguous()  # [groups, chunks * 128]
        self._doubts, self._columns = torch.stack(list(doubts)).float().contiguous(), columns.float().contiguous()
        self._seen, self._scores = (torch.zeros(2, self.size, device=device) for _ in range(2))
        self._h, self._broken = torch.zeros(self.size, device=device), torch.zeros(1, device=device)
        self._sums = torch.zeros(PARTS * SPLITS, self._count * COLUMNS, device=device)
        self._chosen = torch.zeros(2, self.size, dtype=torch.int32, device=device)
        self.grade(taken, coarse)

    def grade(self, taken: int, coarse: int) -> None:
        """Read so many neurons exactly, and let so many write as they are seen."""
        if min(taken, coarse) < 0 or taken + coarse > self.size:
            raise ValueError(f"{taken} and {coarse} of {self.size} neurons")
        self.taken, self.coarse = taken, coarse
        self._splits = max(1, min(SPLITS, -(-max(taken, coarse) // WRITE)))

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's own: codes, and two bytes for each doubt and norm, as they are counted."""
        held = (self._first, self._next, self._dfirst, self._dnext, self._scales, self._dscales)
        return sum(part.nbytes for part in held) + 6 * self.size

    @property
    def bytes_read(self) -> int:
        """Bytes that a token reads."""
        row = self._count * COLUMNS
        beside = self._scales.nbytes + self._dscales.nbytes + 6 * self.size
        exact, seen = 3 * (self._rest * row // 8) + row // 2, row // 2
        return self._first.nbytes + beside + self.taken * exact + self.coarse * seen

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """[taken] and [coarse], the neurons of the last token: read exactly, and writing as they were seen."""
        return self._chosen[0, : self.taken], self._chosen[1, : self.coarse]

    def __call__(self, x: Tensor) -> Tensor:
        """[1, D] -> [1, D]."""
        size, width, count, groups = self.size, self.width, self._count, self._scales.shape[2]
        if x.shape != (1, width) or x.device != self._h.device:
            raise ValueError(f"x is {tuple(x.shape)} on {x.device}, and one token of width {width} is multiplied")
        x, out, one, splits = x.contiguous(), torch.empty_like(x), 2.0**self._rest, self._splits
        sums = self._sums[: PARTS * splits]
        score, rough, chosen, taken, coarse, h = *self._scores, self._chosen, self.taken, self.coarse, self._h
        neurons, wide = triton.next_power_of_2(size), triton.next_power_of_2(width)
        with torch.cuda.device_of(x):
            graded_kernels.look[(triton.cdiv(size, LOOK),)](
                self._first, self._scales, x, self._doubts, self._columns, self._seen, score, rough, h, size, width,
                count, groups, *self.lines[0], *self.lines[1], self.known, one, self.act, LOOK, CHUNKS,
            )  # fmt: skip
            graded_kernels.threshold[(1,)](
                score, rough, x, chosen, self._broken, size, width, taken, coarse, neurons, wide,
                num_warps=max(4, min(32, neurons // 512)),
            )  # fmt: skip
            if taken:
                graded_kernels.exact[(triton.cdiv(taken, EXACT),)](
                    self._next, self._scales, x, self._seen, chosen, h, taken, width, count, groups, self.act, EXACT,
                    CHUNKS, self._rest,
                )  # fmt: skip
            graded_kernels.write[(triton.cdiv(count, BESIDE), len(sums))](
                self._dfirst, self._dnext, self._dscales, chosen, h, sums, size, taken, coarse, count,
                sums.shape[1] * (len(self._dscales) > 1), *self.lines[2], one, splits, WRITE, BESIDE, self._rest,
            )  # fmt: skip
            graded_kernels.add[(triton.cdiv(width, OUT),)](
                sums, self._broken, out, width, sums.shape[1], len(sums), triton.next_power_of_2(len(sums)), OUT
            )
        return out
