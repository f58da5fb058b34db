"""Statistics of the inputs of matrices on a calibration text: quantiles, sums of squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration

BELOW_ALL = -1.0  # magnitudes are never negative: none lies below it
LOW_BITS = 13  # of a float32, ignored in a bin: 10 bits of the mantissa stay, and a bin is .1 % wide
BINS = 1 << (31 - LOW_BITS)


class Quantile:
    """The threshold that as many magnitudes of all tokens exceed as the tokens are to take.

    Magnitudes are counted in bins by the leading bits of a float32. The bit patterns of positive numbers have the order
    of the numbers, so the bins need no range.
    """

    def __init__(self) -> None:
        self.counts, self.share = torch.zeros(BINS, dtype=torch.int64), 0.0

    def add(self, values: Tensor, k: int) -> None:
        """Count tokens, [T, F], that are to take k neurons (or inputs) each."""
        patterns = values.float().abs().reshape(-1).view(torch.int32) >> LOW_BITS
        self.counts += torch.bincount(patterns, minlength=BINS).cpu()
        self.share = 1 - k / values.shape[-1]

    @property
    def threshold(self) -> float:
        """The lower edge of the bin that reaches the share of what is not taken: at most the share lies below it."""
        if self.share <= 0:
            return BELOW_ALL
        reached = self.counts.cumsum(0) >= math.ceil(self.share * int(self.counts.sum()) - 1e-6)  # .6 * 5 is 3
        edge = reached.int().argmax().to(torch.int32) << LOW_BITS
        return float(edge.view(torch.float32))


class MeanLeast:
    """The mean over tokens of each token's k-th largest magnitude."""

    def __init__(self) -> None:
        self.sum, self.tokens = 0.0, 0

    def add(self, values: Tensor, k: int) -> None:
        """Count tokens, [T, F], that are to take k neurons each."""
        self.sum += float(values.float().abs().topk(k).values[:, -1].sum(dtype=torch.float64)) if k else torch.inf
        self.tokens += len(values)

    @property
    def threshold(self) -> float:
        """The mean."""
        return self.sum / max(1, self.tokens)


def all_squares(ffns: Sequence[FFN], calibration: Calibration) -> list[Tensor]:
    """Return the sums of squares of x [D] and of h [F] over the text, fp32, layer by layer."""
    return calibration.once("squares of inputs", lambda: _squares(ffns, calibration))


def _squares(ffns: Sequence[FFN], calibration: Calibration) -> list[Tensor]:
    squares = [[torch.zeros(f.width), torch.zeros(f.size)] for f in ffns]

    def see(layer: int, x: Tensor, h: Tensor) -> None:
        for total, values in zip(squares[layer], (x, h), strict=True):
            total += values.float().square().sum(0).cpu()

    calibration.visit(see)
    return [total for both in squares for total in both]
