"""Paired tests of one metric on the same documents under A and under B. docs/numbers.md has formulas and sources.

Every metric here is a function of sums over documents. Each is linearised at the full sample into one influence value
per document; their differences, summed within clusters, are what the tests see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

ALPHA = 0.05  # intervals cover 1 - ALPHA
RESAMPLES = 10_000
SEED = 20_240_229  # any; fixed, so that two people get the same p
MIN_CLUSTERS = 6  # 2 / 2^5 > .05: with five, no exact test could tell anything from chance
CHUNK = 2**18  # numbers of resamples worked on at a time: they fit a processor's cache
REMEMBERED = 2**24  # drawn numbers that are remembered for the next test of as many units: 32 MB

SIGN_FLIP = {False: "exact McNemar", True: "exact sign flip of clusters"}
BOOTSTRAP = "bootstrap-t"


@dataclass(frozen=True)
class Paired:
    """A against B on one metric.

    Attributes:
        kind: `proportion` (every value 0 or 1), `mean`, `ratio`, `log-perplexity`, `bits` or `bleu`.
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


def mean(values: Values, weights: Values) -> tuple[float, Values]:
    """Weighted mean of [n] values, and its influence values."""
    total = weights.sum()
    value = float(weights @ values / total)
    return value, weights * (values - value) / total


def ratio_of_sums(pairs: Values, _weights: Values) -> tuple[float, Values]:
    """sum x / sum w of [n, 2] pairs (x, w), and its influence values (Cochran 1977, ch. 6)."""
    x, w = pairs.T
    value = float(x.sum() / w.sum())
    return value, (x - value * w) / w.sum()


def log_perplexity(pairs: Values, weights: Values) -> tuple[float, Values]:
    """-sum ll / sum w of [n, 2] pairs (ll, w), and its influence values."""
    value, influence = ratio_of_sums(pairs, weights)
    return -value, -influence


def bits(pairs: Values, weights: Values) -> tuple[float, Values]:
    """`log_perplexity` in bits."""
    value, influence = log_perplexity(pairs, weights)
    return value / math.log(2), influence / math.log(2)


def bleu(counts: Values, _weights: Values) -> tuple[float, Values]:
    """Corpus BLEU of [n, 10] counts (hyp_len, ref_len, correct 1-4, total 1-4), and its influence values.

    BLEU = 100 exp(min(0, 1 - ref / hyp) + mean over n of log(correct_n / total_n)) of the sums, differentiated by them.
    A sum of no correct n-grams has no derivative: smoothing makes BLEU jump there.
    """
    from sacrebleu.metrics import BLEU  # comes with lm-eval; slow to import

    sums = counts.sum(0)
    hyp, ref, *grams = (int(s) for s in sums)
    score = float(BLEU.compute_bleu(grams[:4], grams[4:], hyp, ref, smooth_method="exp").score)
    slope = np.divide(1, sums, out=np.zeros(10), where=sums > 0) * ([0] * 2 + [1 / 4] * 4 + [-1 / 4] * 4)
    if 0 < hyp < ref:
        slope[:2] = ref / hyp**2, -1 / hyp
    return score, (counts - sums / len(counts)) @ (score * slope)


KINDS: dict[str, Callable[[Values, Values], tuple[float, Values]]] = {
    "mean": mean,
    "ratio": ratio_of_sums,
    "log-perplexity": log_perplexity,
    "bits": bits,
    "bleu": bleu,
}


def value(kind: str, values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The metric as records give it: perplexities are no logarithms."""
    made = np.asarray(values, float)
    found = KINDS[kind](made, np.ones(len(made)) if weights is None else np.asarray(weights, float))[0]
    return exp(found) if kind == "log-perplexity" else found


def paired(
    kind: str,
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[object] | None = None,
    weights: ArrayLike | None = None,
    higher_is_better: bool | None = True,
) -> Paired:
    """Compare A with B; row i of both is the same document.

    Args:
        kind: a key of `KINDS`; means of nothing but 0 and 1 become `proportion`.
        a: [n], [n, 2] or [n, 10] values under A, as `kind` takes them.
        b: the same under B.
        clusters: [n] labels; documents of one label are one independent unit. None: every document is one.
        weights: [n] of a weighted mean (groups that weigh their members equally).
        higher_is_better: whether A is worse where its values are smaller; None where neither direction is better.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.shape != y.shape or not len(x):
        raise ValueError(f"not paired: {x.shape} and {y.shape}")
    n = len(x)
    labels = np.arange(n) if clusters is None else np.unique(np.array(list(map(str, clusters))), return_inverse=True)[1]
    count = int(labels.max()) + 1
    w = np.ones(n) if weights is None else np.asarray(weights, float)
    (value_a, influence_a), (value_b, influence_b) = KINDS[kind](x, w), KINDS[kind](y, w)
    difference = 0.0 if np.array_equal(x, y) else value_a - value_b
    influence = influence_a - influence_b
    binary = kind == "mean" and weights is None and bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
    effect, found = None, Tested(reason="values that are not finite")
    if np.isfinite(x).all() and np.isfinite(y).all():
        spread = float(np.std(influence, ddof=1)) if n > 1 else 0.0
        if spread > 1e-12 * abs(difference):
            effect = difference / (n * spread)
        units: Values = np.bincount(labels, influence, count).astype(float)
        if count < MIN_CLUSTERS:
            found = Tested(reason=f"{count} independent units, fewer than {MIN_CLUSTERS}")
        elif binary:
            found = _test_proportions(x - y, labels, units, difference)
        elif np.array_equal(x, y):
            found = Tested(1.0, 1.0, 1.0, 0.0, 0.0, "all values equal", "all values equal")
        else:
            found = replace(bootstrap_t(units, difference), test=BOOTSTRAP, interval=BOOTSTRAP)
    ratio = None
    if kind == "log-perplexity":
        value_a, value_b, ratio = exp(value_a), exp(value_b), exp(difference)
    return Paired(
        kind="proportion" if binary else kind, n=n, clusters=count, value_a=value_a, value_b=value_b,
        difference=difference, ratio=ratio, low=found.low, high=found.high, p=found.p,
        p_worse=None if higher_is_better is None else found.p_less if higher_is_better else found.p_greater,
        effect=effect, test=found.test, interval=found.interval, reason=found.reason,
    )  # fmt: skip


@dataclass(frozen=True)
class Tested:
    """What a test found; see `Paired`. p_less, p_greater: one-sided p of a difference that is too small, too large."""

    p: float | None = None
    p_less: float | None = None
    p_greater: float | None = None
    low: float | None = None
    high: float | None = None
    test: str = ""
    interval: str = ""
    reason: str = ""


def _test_proportions(differences: Values, labels: NDArray[np.int_], units: Values, estimate: float) -> Tested:
    """An exact test of values that are 0 or 1, with an exact interval where there is one.

    Args:
        differences: [n] A - B of each document.
        labels: [n] the number of its cluster.
        units: [K] influence values of the clusters.
        estimate: the difference that `units` belong to.
    """
    n, count = len(differences), len(units)
    sums = np.rint(np.bincount(labels, differences, count)).astype(int)
    test, chances = SIGN_FLIP[count < n], sign_flip(sums)
    if count == n:
        return Tested(*chances, *tango(int((sums > 0).sum()), int((sums < 0).sum()), n), test, "Tango")
    if not sums.any():
        return Tested(*chances, *tango(0, 0, count), test, "Tango on clusters")
    made = bootstrap_t(units, estimate)
    return Tested(*chances, made.low, made.high, test, BOOTSTRAP, made.reason)


def exp(value: float) -> float:
    """e to the power of `value`; infinite where that is beyond all floats."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


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
    t = estimate / error
    # Neither the order of the units nor which side is called A may matter, so both are settled before drawing.
    sign = -1.0 if t < 0 else 1.0
    drawn = np.sort(_statistics(np.sort(sign * units), resamples, seed))  # with t >= 0
    degenerate = int(np.isnan(drawn).sum())  # sorted last
    drawn = drawn[: resamples - degenerate]
    sizes = np.sort(np.abs(drawn))
    above = len(drawn) - int(np.searchsorted(drawn, abs(t), "left"))
    below = int(np.searchsorted(drawn, abs(t), "right"))
    beyond = len(drawn) - int(np.searchsorted(sizes, abs(t), "left"))
    p, p_above, p_below = ((1 + degenerate + found) / (1 + resamples) for found in (beyond, above, below))
    p_above = max(p_above, p / 2)  # one tail alone is too bold on few, skewed or mostly equal documents
    p_less, p_greater = (p_below, p_above) if sign > 0 else (p_above, p_below)
    last = math.ceil((1 - ALPHA) * (1 + resamples)) - 1
    if last >= len(sizes):
        return Tested(p, p_less, p_greater, reason="too few units differ")
    margin = float(sizes[last]) * error
    return Tested(p, p_less, p_greater, estimate - margin, estimate + margin)


def _statistics(units: Values, resamples: int, seed: int) -> Values:
    """Studentised sums of resamples of the units [resamples]; NaN where a resample has no spread."""
    k, found = len(units), []
    for numbers in (_remembered if k * resamples <= REMEMBERED else _draws)(k, resamples, seed):
        drawn = units.take(numbers)
        total, squares = drawn.sum(1), np.einsum("ij,ij->i", drawn, drawn)
        variance = squares - total**2 / k
        variance[variance <= 1e-12 * squares] = np.nan
        found.append(total / np.sqrt(k / (k - 1) * variance))
    return np.concatenate(found)


def _draws(k: int, resamples: int, seed: int) -> Iterator[NDArray[np.integer]]:
    """Yield the numbers of the units in each resample [some of the resamples, k]."""
    generator, rows = np.random.default_rng(seed), max(1, CHUNK // k)
    for start in range(0, resamples, rows):
        yield generator.integers(0, k, (min(rows, resamples - start), k), dtype=np.int32)


@functools.lru_cache(maxsize=4)
def _remembered(k: int, resamples: int, seed: int) -> list[NDArray[np.integer]]:
    """Return all draws: drawing takes longer than the test, and rows of a board share their documents."""
    return [numbers.astype(np.uint16) for numbers in _draws(k, resamples, seed)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) adjusted p of tests taken together; None, where nothing could be tested, stays None."""
    adjusted: list[float | None] = [None] * len(p_values)
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return adjusted
