"""A number with its uncertainty: a smooth function of sums over documents, with an influence value for each of them.

Means, differences and ratios of estimates are estimates again, so that a mean over tasks, its interval and the paired
test of two rows all follow from the same documents. docs/statistics.md has the formulas and their sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dart_eval.results import stats

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value and the influence that each independent unit of documents has on it.

    Attributes:
        value: the estimate.
        units: unit of documents -> its influence value; they sum to 0.
    """

    value: float
    units: Mapping[str, float]

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, _sums(self.units, other.units, 1.0))

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, _sums(self.units, other.units, -1.0))

    def times(self, factor: float) -> Estimate:
        """The estimate multiplied by a number that is known exactly."""
        return Estimate(factor * self.value, {unit: factor * slope for unit, slope in self.units.items()})

    @property
    def stderr(self) -> float | None:
        """The standard error; None of one unit."""
        count = len(self.units)
        return math.sqrt(count / (count - 1) * sum(u * u for u in self.units.values())) if count > 1 else None

    @cached_property
    def tested(self) -> stats.Studentised | None:
        """The studentised bootstrap over units; None where the units are too few or all the same, or no numbers."""
        slopes = np.array([self.units[unit] for unit in sorted(self.units)])
        if not np.isfinite([self.value, *slopes]).all():
            return None
        return stats.bootstrap_t(slopes, self.value) if len(slopes) >= stats.MIN_CLUSTERS and slopes.any() else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval; None where there is none."""
        made = self.tested
        return None if made is None or made.low is None or made.high is None else (made.low, made.high)

    @property
    def p(self) -> float | None:
        """Two-sided p of the value 0; None where nothing can be tested."""
        return None if self.tested is None else self.tested.p


@dataclass(frozen=True)
class Share:
    """A ratio of two estimates, with Fieller's interval (1954).

    Attributes:
        value: numerator / denominator.
        interval: 95 %: the ratios r for which numerator - r denominator is not told apart from 0.
    """

    value: float
    interval: Interval


def mean(estimates: Iterable[Estimate]) -> Estimate | None:
    """The mean, in which each weighs the same; None of none."""
    found = list(estimates)
    return sum(found[1:], found[0]).times(1 / len(found)) if found else None


def share(part: Estimate, whole: Estimate, documents: int = 0) -> Share | None:
    """part / whole; None where the whole is not above 0 by more than noise, for then no interval has two ends.

    The test behind the interval is Student's t over the units. To the variance of part - r whole comes that of one
    document that differs by 1, so that a few on which both are alike do not make an interval without width.

    Args:
        part: the numerator. whole: the denominator. documents: of both; as many as there are units, without it.
    """
    names = sorted(part.units.keys() | whole.units.keys())
    slopes = np.array([[side.units.get(unit, 0.0) for unit in names] for side in (part, whole)])
    if len(names) < stats.MIN_CLUSTERS or not np.isfinite(slopes).all() or not math.isfinite(part.value):
        return None
    values = np.array([part.value, whole.value])
    products = np.outer(values, values) - _squares(len(names)) * (slopes @ slopes.T)
    products[0, 0] -= _squares(len(names)) / (documents or len(names)) ** 2
    if whole.value <= 0 or products[1, 1] <= 0:
        return None
    middle = products[0, 1] / products[1, 1]
    half = math.sqrt(max(0.0, middle**2 - products[0, 0] / products[1, 1]))
    return Share(part.value / whole.value, (middle - half, middle + half))


def above_zero(found: Estimate) -> bool:
    """Whether an estimate lies above 0 by more than noise: the condition of `share`."""
    return share(found, found) is not None


def _squares(count: int) -> float:
    """What the sum of squared influence values is multiplied by: the square of an interval's half width over it."""
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(count - 1, 1 - stats.ALPHA / 2)) ** 2 * count / (count - 1)


def _sums(a: Mapping[str, float], b: Mapping[str, float], sign: float) -> dict[str, float]:
    return {unit: a.get(unit, 0.0) + sign * b.get(unit, 0.0) for unit in a.keys() | b.keys()}
