"""Gated FFNs of one token on a CPU, one class for each kind of weights: act(gate x) * (up x), then down.

All of them add up in fp32, take any floating dtype and give it back. Threads (`torch.get_num_threads()`) share the
neurons; sums follow from their number alone. Where x is no number in some place, neither is what comes out.
"""

from __future__ import annotations

from torch import Tensor

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import ACTS, Coded, call
from dart_eval.kernels.cpu.packing import FIRST, Codes, pack
from dart_eval.weights.codes import Packed


class CodedFFN:
    """An FFN of weights of 4, 5, 6 or 8 bits, all of which are read.

    Args:
        gate, up: [F, D]. down: [D, F]. All of as many bits, with a scale for 128 neighbours or for a row.
        act: one of `ACTS`. level: `avx2`, `avx512`, or None for the best that there is.
    """

    def __init__(self, gate: Packed, up: Packed, down: Packed, act: str = "silu", level: str | None = None) -> None:
        self._level = build.level(level)
        self.codes: Codes = pack(gate, up, down)
        codes, padded, chunks = self.codes, self.codes.scales.shape[0] * 4, self.codes.first.shape[1]
        self._job = Coded(
            codes.neurons, padded, codes.width, chunks, codes.bits - FIRST, 2 ** (codes.bits - 1), ACTS.index(act),
            codes.step, codes.group,
        )  # fmt: skip
        for name in ("first", "last", "dfirst", "dlast", "scales", "dscales"):
            setattr(self._job, name, getattr(codes, name).data_ptr())

    @property
    def bytes_read(self) -> int:
        """Bytes that a token reads: all of them."""
        return self.codes.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[1, D] -> [1, D]."""
        return call(self._job, x, self._level)
