"""The ratio of times that were taken in turn, which every benchmark reports."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its quartiles, over n pairs."""

    median: float
    low: float
    high: float
    n: int


def paired(above: list[float], below: list[float], offset: float = 0.0) -> Ratio:
    """Return the ratio above / below - offset, pair by pair."""
    ratios = sorted(a / b - offset for a, b in zip(above, below, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(median, max(low, ratios[0]), min(high, ratios[-1]), len(ratios))  # of two they lie beyond both
