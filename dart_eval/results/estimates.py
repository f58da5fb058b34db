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
        """Two-sided p of the value 0; None where nothing can be tested.

        Resamples cannot give less than 1 / (1 + their number), which many rows together would never pass: beyond all of
        them it is that of Student's t.
        """
        made = self.tested
        if made is None or made.p is None or made.p > 1 / (1 + stats.RESAMPLES) or not self.stderr:
            return None if made is None else made.p
        from scipy.special import stdtr  # slow to import

        return min(made.p, 2 * float(stdtr(len(self.units) - 1, -abs(self.value) / self.stderr)))


@dataclass(frozen=True)
class Share:
    """A ratio of two estimates.

    Attributes:
        value: numerator / denominator. interval: 95 %; None where there is none.
    """

    value: float
    interval: Interval | None


def mean(estimates: Iterable[Estimate]) -> Estimate | None:
    """The mean, in which each weighs the same; None of none."""
    found = list(estimates)
    return sum(found[1:], found[0]).times(1 / len(found)) if found else None


def share(part: Estimate, whole: Estimate, step: float = 0.0) -> Share | None:
    """part / whole with Fieller's interval (1954); None where the whole is not above 0 by more than noise.

    The interval holds the ratios r for which part - r whole is not told apart from 0 by Student's t over the units. To
    its variance comes step^2, so that a few answers that are all alike do not make an interval without width.

    Args:
        part: the numerator. whole: the denominator. step: what one answer that differs moves the part by.
    """
    names = sorted(part.units.keys() | whole.units.keys())
    slopes = np.array([[side.units.get(unit, 0.0) for unit in names] for side in (part, whole)])
    if not above_zero(whole) or not np.isfinite(slopes).all() or not math.isfinite(part.value):
        return None
    ((parts, both), (_, wholes)) = _squares(len(names)) * (slopes @ slopes.T)
    # The roots of a r^2 - 2 b r + c.
    a, b = whole.value**2 - wholes, part.value * whole.value - both
    c = part.value**2 - parts - _squares(len(names)) * (len(names) - 1) / len(names) * step**2
    if a <= 0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c)) / a
    return Share(part.value / whole.value, (b / a - half, b / a + half))


def above_zero(found: Estimate) -> bool:
    """Whether an estimate lies above 0 by more than noise, by Student's t."""
    slopes = np.array(list(found.units.values()))
    enough = len(slopes) >= stats.MIN_CLUSTERS and found.value > 0
    return bool(enough and found.value**2 > _squares(len(slopes)) * (slopes @ slopes))


def _squares(count: int) -> float:
    """What the sum of squared influence values is multiplied by: the square of an interval's half width over it."""
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(count - 1, 1 - stats.ALPHA / 2)) ** 2 * count / (count - 1)


def _sums(a: Mapping[str, float], b: Mapping[str, float], sign: float) -> dict[str, float]:
    return {unit: a.get(unit, 0.0) + sign * b.get(unit, 0.0) for unit in a.keys() | b.keys()}
