"""Statistics of the inputs of matrices on a calibration text: quantiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
