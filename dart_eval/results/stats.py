"""Metrics with their uncertainty, and paired tests of one under A and under B. docs/numbers.md has the sources.

Every metric is sum x / sum w over documents, times a constant. It is linearised at the full sample into one influence
value per document (Cochran 1977, ch. 6). Means, differences and ratios of such estimates are estimates, so a mean over
tasks, its interval and the test of two rows all follow from the same documents.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dart_eval.results.sums import Values, exp, linearised

ALPHA = 0.05  # intervals cover 1 - ALPHA
RESAMPLES = 10_000
SEED = 20_240_229  # any; fixed, so that two people get the same p
MIN_CLUSTERS = 6  # 2 / 2^5 > .05: with five, no exact test could tell anything from chance
CHUNK = 2**18  # numbers of resamples worked on at a time: they fit a processor's cache
BOOTSTRAP = "bootstrap-t"


@dataclass(frozen=True)
class Paired:
    """A against B on one metric.

    Attributes:
        kind: `proportion` (every value 0 or 1), `mean`, `ratio`, `log-perplexity` or `bits`.
        n, clusters: documents, and independent units among them.
        value_a, value_b: the metric as records give it.
        difference: A - B on the metric's own scale; of perplexities, of their logarithms (nats per word or byte).
        ratio: of perplexities A / B, else None.
        low, high: interval of `difference` at 1 - ALPHA, or None.
        p: two-sided. p_worse: one-sided, small where A is worse; None also where neither direction is better.
        effect: difference / standard deviation of the documents' paired differences, None where that is 0.
        test, interval: how p and the interval were made.
        reason: why p or the interval are missing, or empty.
    """

    kind: str
    n: int
    clusters: int
    value_a: float
    value_b: float
    difference: float
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    p_worse: float | None
    effect: float | None
    test: str
    interval: str
    reason: str = ""


class Tested(NamedTuple):
    """What a test found; see `Paired`. p_less, p_greater: one-sided p of a difference that is too small, too large."""

    p: float | None = None
    p_less: float | None = None
    p_greater: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def paired(
    kind: str, a: ArrayLike, b: ArrayLike, units: Sequence[object] | None = None, higher_is_better: bool | None = True
) -> Paired:
    """Compare A with B; row i of both is the same document.

    Answers that are right or wrong have an exact test, and an exact interval where there is one.

    Args:
        kind: a key of `sums.SCALES`; unweighted means of nothing but 0 and 1 become `proportion`.
        a: [n, 2] x and w under A (`linearised`), or [n] values of an unweighted mean.
        b: the same under B.
        units: [n] labels; documents of one label are one independent unit. None: every document is one.
        higher_is_better: whether A is worse where its values are smaller; None where neither direction is better.
    """
    x, y = (np.asarray(side, float) for side in (a, b))
    x, y = (side if side.ndim > 1 else np.stack([side, np.ones(len(side))], 1) for side in (x, y))
    n = len(x)
    labels = np.arange(n) if units is None else np.unique(np.array(list(map(str, units))), return_inverse=True)[1]
    count = int(labels.max()) + 1
    (value_a, influence_a), (value_b, influence_b) = linearised(kind, x), linearised(kind, y)
    same, influence = np.array_equal(x, y), influence_a - influence_b
    difference, spread = 0.0 if same else value_a - value_b, float(np.std(influence, ddof=1)) if n > 1 else 0.0
    sums: Values = np.bincount(labels, influence, count).astype(float)
    binary = kind == "mean" and bool((x[:, 1] == 1).all() and np.isin([x[:, 0], y[:, 0]], (0, 1)).all())
    test = interval = ""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        tested = Tested(reason="values that are not finite")
    elif count < MIN_CLUSTERS:
        tested = Tested(reason=f"{count} independent units, fewer than {MIN_CLUSTERS}")
    elif binary:
        flips = np.rint(np.bincount(labels, x[:, 0] - y[:, 0], count)).astype(int)
        test, p_values = "exact McNemar" if count == n else "exact sign flip of clusters", sign_flip(flips)
        if count == n or not flips.any():
            interval = "Tango" if count == n else "Tango on clusters"
            tested = Tested(*p_values, *tango(int((flips > 0).sum()), int((flips < 0).sum()), count))
        else:
            interval, (*_, low, high, reason) = BOOTSTRAP, bootstrap_t(sums, difference)
            tested = Tested(*p_values, low, high, reason)
    elif same:
        tested, test, interval = Tested(1.0, 1.0, 1.0, 0.0, 0.0), "all values equal", "all values equal"
    else:
        tested, test, interval = bootstrap_t(sums, difference), BOOTSTRAP, BOOTSTRAP
    is_log = kind == "log-perplexity"
    return Paired(
        kind="proportion" if binary else kind, n=n, clusters=count, value_a=exp(value_a) if is_log else value_a,
        value_b=exp(value_b) if is_log else value_b, difference=difference, ratio=exp(difference) if is_log else None,
        low=tested.low, high=tested.high, p=tested.p,
        p_worse=None if higher_is_better is None else tested.p_less if higher_is_better else tested.p_greater,
        effect=difference / (n * spread) if spread > 1e-12 * abs(difference) else None, test=test, interval=interval,
        reason=tested.reason,
    )  # fmt: skip


def sign_flip(sums: NDArray[np.int_]) -> tuple[float, float, float]:
    """Exact p of [K] whole cluster sums whose signs are free under the null: two-sided, sum too small, sum too large.

    The null distribution is a convolution of binomials, one for each size of sum. Where every sum is -1, 0 or 1
    this is McNemar's exact test.
    """
    from scipy.stats import binom  # here and below: slow to import, and a board needs none of it

    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    mass = np.ones(1)  # of the sum of the positive ones
    for size, count in zip(sizes, counts, strict=True):
        part = np.zeros(size * count + 1)
        part[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        mass = np.convolve(mass, part)
    positive = int(sums[sums > 0].sum())
    less, greater = float(mass[: positive + 1].sum()), float(mass[positive:].sum())
    return min(1.0, 2 * min(less, greater)), min(1.0, less), min(1.0, greater)


def tango(b: int, c: int, n: int) -> tuple[float, float]:
    """Tango's score interval (1998) of the difference (b - c) / n between two proportions on the same n items.

    b: right under A only. c: right under B only.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, estimate = norm.ppf(1 - ALPHA / 2), (b - c) / n

    def score(difference: float) -> float:
        linear = (2 * n - b + c) * difference - b - c
        root = math.sqrt(max(0.0, linear**2 + 8 * n * c * difference * (1 - difference)))
        under_null = (root - linear) / (4 * n)  # share of c, of maximal likelihood given the difference
        variance = n * (2 * under_null + difference * (1 - difference))
        numerator = b - c - n * difference
        if numerator == 0:
            return 0.0
        return numerator / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, numerator)

    def solve(end: float, target: float) -> float:
        if abs(end - estimate) < 1e-12:
            return end
        edge = end + (estimate - end) * 1e-12  # the score is 0/0 or infinite at the very end
        return float(brentq(lambda d: max(-1e9, min(1e9, score(d) - target)), edge, estimate, xtol=1e-14))

    return solve(-1.0, z), solve(1.0, -z)


def bootstrap_t(units: Values, estimate: float, resamples: int = RESAMPLES, seed: int = SEED) -> Tested:
    """Symmetric studentised bootstrap (Davison and Hinkley 1997, 2.4 and 5.2) of an estimate.

    units: [K] influence values of independent units, which sum to 0. p is (1 + resamples beyond) / (1 + resamples).
    A resample without spread counts as beyond: that is the safe side.
    """
    k = len(units)
    error = math.sqrt(k / (k - 1) * float(units @ units))
    if error <= 1e-9 * abs(estimate):
        return Tested(reason="the same difference everywhere: no spread to test against")
    # Neither the order of the units nor which side is called A may matter, so both are settled before drawing.
    t, sign = abs(estimate) / error, -1.0 if estimate < 0 else 1.0
    units = np.sort(sign * units)
    generator, rows, parts = np.random.default_rng(seed), max(1, CHUNK // k), []
    for start in range(0, resamples, rows):
        sample = units.take(generator.integers(0, k, (min(rows, resamples - start), k), dtype=np.int32))
        total, squares = sample.sum(1), np.einsum("ij,ij->i", sample, sample)
        variance = squares - total**2 / k
        variance[variance <= 1e-12 * squares] = np.nan  # no spread
        parts.append(total / np.sqrt(k / (k - 1) * variance))
    drawn = np.concatenate(parts)
    flat = np.isnan(drawn)
    beyond, above, below = abs(drawn) >= t, drawn >= t, drawn <= t
    p, p_above, p_below = ((1 + int((flat | far).sum())) / (1 + resamples) for far in (beyond, above, below))
    p_above = max(p_above, p / 2)  # one tail alone is too bold on few, skewed or mostly equal documents
    p_less, p_greater = (p_below, p_above) if sign > 0 else (p_above, p_below)
    sizes, last = np.sort(abs(drawn[~flat])), math.ceil((1 - ALPHA) * (1 + resamples)) - 1
    if last >= len(sizes):
        return Tested(p, p_less, p_greater, reason="too few units differ")
    margin = float(sizes[last]) * error
    return Tested(p, p_less, p_greater, estimate - margin, estimate + margin)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) adjusted p of tests taken together; None, where nothing could be tested, stays None."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    scaled = [min(1.0, (len(tested) - rank) * p) for rank, (p, _) in enumerate(tested)]
    adjusted = {i: p for (_, i), p in zip(tested, itertools.accumulate(scaled, max), strict=True)}
    return [adjusted.get(i) for i in range(len(p_values))]


Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value and the influence of each independent unit of documents on it.

    Attributes:
        value: the estimate.
        units: unit of documents -> its influence value; they sum to 0.
        fewest: units of the smallest part, such as a task of a mean; None: there is one part.
    """

    value: float
    units: Mapping[str, float]
    fewest: int | None = None

    def __add__(self, other: Estimate) -> Estimate:
        units = {u: self.units.get(u, 0.0) + other.units.get(u, 0.0) for u in {**self.units, **other.units}}
        return Estimate(self.value + other.value, units, min(self.smallest, other.smallest))

    def __sub__(self, other: Estimate) -> Estimate:
        return self + other.times(-1.0)

    def times(self, factor: float) -> Estimate:
        """Return the estimate multiplied by an exact number."""
        units = {unit: factor * slope for unit, slope in self.units.items()}
        return Estimate(factor * self.value, units, self.fewest)

    def exp_minus(self) -> Share:
        """Return e to the power of minus the estimate: the ratio that a difference of logarithms stands for."""
        ends = self.interval
        return Share(exp(-self.value), ends and (exp(-ends[1]), exp(-ends[0])))

    @property
    def smallest(self) -> int:
        """Independent units of the smallest part."""
        return len(self.units) if self.fewest is None else self.fewest

    @property
    def stderr(self) -> float | None:
        """The standard error; None for one unit."""
        count = len(self.units)
        return math.sqrt(count / (count - 1) * sum(u * u for u in self.units.values())) if count > 1 else None

    @cached_property
    def tested(self) -> Tested:
        """The studentised bootstrap over units; without p if they are too few, all the same, or not finite."""
        slopes = np.array([self.units[unit] for unit in sorted(self.units)])
        able = self.smallest >= MIN_CLUSTERS and slopes.any() and np.isfinite([self.value, *slopes]).all()
        return bootstrap_t(slopes, self.value) if able else Tested()

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, or None."""
        low, high = self.tested.low, self.tested.high
        return None if low is None or high is None else (low, high)

    @property
    def p(self) -> float | None:
        """Two-sided p of the value 0; None if it cannot be tested.

        Resamples cannot give less than 1 / (1 + their number), which many rows together would never pass. At that limit
        p is Student's t's.
        """
        p, student = self.tested.p, self.student
        return p if p is None or student is None or p > 1 / (1 + RESAMPLES) else min(p, student)

    @property
    def student(self) -> float | None:
        """Two-sided p of the value 0 by Student's t over the units; None if it cannot be tested."""
        from scipy.special import stdtr  # slow to import

        if self.smallest < MIN_CLUSTERS or not self.stderr or not math.isfinite(self.value):
            return None
        return 2 * float(stdtr(len(self.units) - 1, -abs(self.value) / self.stderr))


class Share(NamedTuple):
    """A ratio of two estimates, and its 95 % interval, or None."""

    value: float
    interval: Interval | None


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return the sum of at least one estimate."""
    return functools.reduce(operator.add, estimates)


def mean(estimates: Iterable[Estimate]) -> Estimate | None:
    """Return the unweighted mean; None without estimates."""
    terms = list(estimates)
    return total(terms).times(1 / len(terms)) if terms else None


def share(part: Estimate, whole: Estimate, step: float = 0.0) -> Share | None:
    """Return part / whole with Fieller's interval (1954); None if the whole is not above 0 by more than noise.

    The interval holds the ratios r for which part - r whole does not differ from 0 by Student's t over the units. Its
    variance includes step^2, so that a few equal answers do not make an interval without width.

    Args:
        step: change of the part by one answer.
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


def above_zero(estimate: Estimate) -> bool:
    """Whether an estimate lies above 0 by more than noise, by Student's t."""
    certain = estimate.smallest >= MIN_CLUSTERS and not any(estimate.units.values())
    return estimate.value > 0 and (certain or ((p := estimate.student) is not None and p < ALPHA))


def _squares(count: int) -> float:
    """Return the squared half width of an interval / the sum of squared influence values."""
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(count - 1, 1 - ALPHA / 2)) ** 2 * count / (count - 1)
