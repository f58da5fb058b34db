"""A number with its uncertainty: a smooth function of sums over documents, with an influence value for each of them.

Means, differences and ratios of estimates are estimates, so a mean over tasks, its interval and the paired test of two
rows all follow from the same documents. docs/numbers.md has the formulas and their sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dart_eval.results import stats

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value and the influence of each independent unit of documents on it.

    Attributes:
        value: the estimate.
        units: unit of documents -> its influence value; they sum to 0.
        fewest: units of the smallest part, such as a task of a mean; by default there is one part.
    """

    value: float
    units: Mapping[str, float]
    fewest: int = -1

    def __post_init__(self) -> None:
        if self.fewest < 0:
            object.__setattr__(self, "fewest", len(self.units))

    def __add__(self, other: Estimate) -> Estimate:
        units = {u: self.units.get(u, 0.0) + other.units.get(u, 0.0) for u in {**self.units, **other.units}}
        return Estimate(self.value + other.value, units, min(self.fewest, other.fewest))

    def __sub__(self, other: Estimate) -> Estimate:
        return self + other.times(-1.0)

    def times(self, factor: float) -> Estimate:
        """Return the estimate multiplied by an exact number."""
        units = {unit: factor * slope for unit, slope in self.units.items()}
        return Estimate(factor * self.value, units, self.fewest)

    def exp_minus(self) -> Share:
        """Return e to the power of minus the estimate: the ratio that a difference of logarithms stands for."""
        ends = self.interval
        return Share(stats.exp(-self.value), ends and (stats.exp(-ends[1]), stats.exp(-ends[0])))

    @property
    def stderr(self) -> float | None:
        """The standard error; None for one unit."""
        count = len(self.units)
        return math.sqrt(count / (count - 1) * sum(u * u for u in self.units.values())) if count > 1 else None

    @property
    def none(self) -> bool:
        """Whether a difference is 0 in every unit, and the units are enough for a test."""
        return not self.value and not any(self.units.values()) and self.fewest >= stats.MIN_CLUSTERS

    @cached_property
    def tested(self) -> stats.Tested | None:
        """The studentised bootstrap over units; None if they are too few, all the same, or not finite."""
        slopes = np.array([self.units[unit] for unit in sorted(self.units)])
        if not np.isfinite([self.value, *slopes]).all():
            return None
        return stats.bootstrap_t(slopes, self.value) if self.fewest >= stats.MIN_CLUSTERS and slopes.any() else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, or None."""
        test = self.tested
        return None if test is None or test.low is None or test.high is None else (test.low, test.high)

    @property
    def p(self) -> float | None:
        """Two-sided p of the value 0; None if it cannot be tested.

        Resamples cannot give less than 1 / (1 + their number), which many rows together would never pass. At that limit
        p is Student's t's.
        """
        test, student = self.tested, self.student
        if test is None or test.p is None or test.p > 1 / (1 + stats.RESAMPLES) or student is None:
            return None if test is None else test.p
        return min(test.p, student)

    @property
    def student(self) -> float | None:
        """Two-sided p of the value 0 by Student's t over the units; None if it cannot be tested."""
        from scipy.special import stdtr  # slow to import

        if self.fewest < stats.MIN_CLUSTERS or not self.stderr or not math.isfinite(self.value):
            return None
        return 2 * float(stdtr(len(self.units) - 1, -abs(self.value) / self.stderr))


class Share(NamedTuple):
    """A ratio of two estimates, and its 95 % interval, or None."""

    value: float
    interval: Interval | None


def mean(estimates: Iterable[Estimate]) -> Estimate | None:
    """Return the unweighted mean; None without estimates."""
    found = list(estimates)
    return sum(found[1:], found[0]).times(1 / len(found)) if found else None


def share(part: Estimate, denominator: Estimate, step: float = 0.0) -> Share | None:
    """Return part / whole with Fieller's interval (1954); None if the whole is not above 0 by more than noise.

    The interval holds the ratios r for which part - r whole does not differ from 0 by Student's t over the units. Its
    variance includes step^2, so that a few equal answers do not make an interval without width.

    Args:
        part: the numerator.
        denominator: the whole.
        step: change of the part by one answer.
    """
    names = sorted(part.units.keys() | denominator.units.keys())
    slopes = np.array([[side.units.get(unit, 0.0) for unit in names] for side in (part, denominator)])
    if not above_zero(denominator) or not np.isfinite(slopes).all() or not math.isfinite(part.value):
        return None
    ((parts, both), (_, wholes)) = _squares(len(names)) * (slopes @ slopes.T)
    # The roots of a r^2 - 2 b r + c.
    a, b = denominator.value**2 - wholes, part.value * denominator.value - both
    c = part.value**2 - parts - _squares(len(names)) * (len(names) - 1) / len(names) * step**2
    if a <= 0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c)) / a
    return Share(part.value / denominator.value, (b / a - half, b / a + half))


def above_zero(estimate: Estimate) -> bool:
    """Whether an estimate lies above 0 by more than noise, by Student's t."""
    certain = estimate.fewest >= stats.MIN_CLUSTERS and not any(estimate.units.values())
    return estimate.value > 0 and (certain or ((p := estimate.student) is not None and p < stats.ALPHA))


def _squares(count: int) -> float:
    """Return the squared half width of an interval / the sum of squared influence values."""
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(count - 1, 1 - stats.ALPHA / 2)) ** 2 * count / (count - 1)
