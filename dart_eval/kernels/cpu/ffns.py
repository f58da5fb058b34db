"""Gated FFNs of one token on a CPU, one class for each kind of weights: act(gate x) * (up x), then down.

All of them add up in fp32, take any floating dtype and give it back. Threads (`torch.get_num_threads()`) share the
neurons; sums follow from their number alone. Where x is no number in some place, neither is what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import ACTS, Coded, call
from dart_eval.kernels.cpu.packing import COLUMNS, FIRST, Codes, pack
from dart_eval.weights.codes import Packed


class CodedFFN:
    """An FFN of weights of 4, 5, 6 or 8 bits, all of which are read.

    Args:
        gate, up: [F, D]. down: [D, F]. All of as many bits, with a scale for 128 neighbours or for a row.
        act: one of `ACTS`. level: `avx2`, `avx512`, or None for the best that there is.
    """

    turns = 16

    def __init__(self, gate: Packed, up: Packed, down: Packed, act: str = "silu", level: str | None = None) -> None:
        self._level = build.level(level)
        self.codes: Codes = pack(gate, up, down, self.turns)
        held, padded, count = self.codes, self.codes.scales.shape[0] * 4, self.codes.first.shape[1]
        self.size, self.width, self._rest = held.neurons, held.width, held.bits - FIRST
        self._job: Any = Coded(
            held.neurons, padded, held.width, count, self._rest, 2 ** (held.bits - 1), ACTS.index(act), held.step,
            held.group, held.turns,
        )  # fmt: skip
        for name in ("first", "next", "dfirst", "dnext", "scales", "dscales"):
            setattr(self._job, name, getattr(held, name).data_ptr())
        self._chosen = torch.zeros(2, padded, dtype=torch.int32)
        self._job.chosen = self._chosen.data_ptr()
        wide = count * COLUMNS
        self._scratch = 7 * padded + wide // 2 + 2 * wide, wide

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's own."""
        return self.codes.nbytes

    bytes_read = nbytes  # a token reads all of them

    def __call__(self, x: Tensor) -> Tensor:
        """[1, D] -> [1, D]."""
        return call("coded_ffn", self._job, x, *self._scratch, self._level)


class GradedFFN(CodedFFN):
    """The same as dart-plus reads it: the first 4 bits of gate and up, then the rest of the neurons most open.

    These write with all bits of down. The next ones write as the first bits of all matrices have them. The formulas are
    those of `DartPlus` and `Preview.look`; first bits stand for `Packed.line`.

    Args:
        gate, up, down, act, level: as of `CodedFFN`, of 5 bits at least.
        doubts: of gate and up, [F] each: the root mean square of what first bits leave out of a row.
        columns: [F], squares of the norms of down's columns.
        taken, coarse: neurons that are read exactly, and that write as they are seen.
        known: as of `DartPlus`.

    Attributes:
        lines: slope and offset of what first bits stand for, in codes; of gate, up and down.
    """

    turns = 1

    def __init__(
        self, gate: Packed, up: Packed, down: Packed, doubts: Sequence[Tensor] | Tensor, columns: Tensor, taken: int,
        coarse: int, known: float = 0.2, act: str = "silu", level: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(gate, up, down, act, level)
        if not self._rest:
            raise ValueError(f"codes of {self.codes.bits} bits are read at once")
        self.lines = [held.line(held.rounding.bits - FIRST) for held in (gate, up, down)]
        beside = self._job.padded - self.size
        self._doubts = pad(torch.stack(list(doubts)).float(), (0, beside)).contiguous()
        self._columns = pad(columns.float(), (0, beside)).contiguous()
        job = self._job
        job.doubts, job.columns, job.known, job.graded = self._doubts.data_ptr(), self._columns.data_ptr(), known, 1
        job.line = type(job.line)(*(number for line in self.lines for number in line))
        self.grade(taken, coarse)

    def grade(self, taken: int, coarse: int) -> None:
        """Read so many neurons exactly, and let so many write as they are seen."""
        if min(taken, coarse) < 0 or taken + coarse > self.size:
            raise ValueError(f"{taken} and {coarse} of {self.size} neurons")
        self.taken, self.coarse = self._job.taken, self._job.coarse = taken, coarse

    @property
    def nbytes(self) -> int:
        """Bytes beside the model's own: codes, and two bytes for each doubt and norm, as they are counted."""
        return self.codes.nbytes + 6 * self.size

    @property
    def bytes_read(self) -> int:
        """Bytes that a token reads."""
        held, row = self.codes, self.codes.first.shape[1] * COLUMNS
        rest = self._rest * row // 8
        beside = held.scales.nbytes + held.dscales.nbytes + 6 * self.size
        return held.first.nbytes + beside + self.taken * (3 * rest + row // 2) + self.coarse * row // 2

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """[taken] and [coarse], the neurons of the last token: read exactly, and writing as they were seen."""
        return self._chosen[0, : self.taken], self._chosen[1, : self.coarse]
