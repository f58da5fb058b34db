"""The exact paired tests, by counting. docs/numbers.md says which metric has which.

McNemar (1947). On documents that only one of A and B gets right - b of them A, c of them B - each is as likely as the
other if there is no difference: a fair coin for each of the b + c.

    p = min(1, 2 P(at most min(b, c) heads of b + c coins));   that A is worse: P(at most b heads)

Sign flip. Documents that belong together are one unit, whose sum of differences A - B is a whole number s_k; without
a difference, each s_k could as well be -s_k. Of the 2^K ways to choose the signs, p is twice the smaller of the shares
whose total is at most, or at least, the one seen (at most 1). With one document a unit this is McNemar's test.

Tango (1998). The interval of the difference d of the two shares of right answers holds all d with |z(d)| <= 1.96, where

    z(d) = (b - c - n d) / sqrt(n (2 q + d - d^2)),

q being the most likely share of documents that only B gets right, if the difference is d: that which maximises
b log(q + d) + c log q + (n - b - c) log(1 - 2 q - d).

Holm (1979). Of m tests the smallest p is multiplied by m, the next by m - 1, and so on; none may be smaller than one
before it, and none is larger than 1. A test that could not be made takes no part.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from dart_eval.results.stats import holm, paired, sign_flip, tango

CASES = [(0, 0, 12), (3, 1, 20), (12, 2, 50), (2, 12, 50), (40, 20, 160), (0, 7, 30), (7, 0, 30), (5, 5, 10), (6, 0, 6)]
Z = 1.959963984540054  # a normal number is beyond it, on either side, in 5 of 100 cases


def heads(at_most, coins):
    """Probability of so many heads, exactly."""
    return Fraction(sum(math.comb(coins, k) for k in range(at_most + 1)), 2**coins)


def mcnemar(b, c):
    """p, and that of A being worse."""
    return float(min(1, 2 * heads(min(b, c), b + c))), float(heads(b, b + c))


def flipped(sums):
    """Two-sided p, P(total <= the one seen), P(total >= the one seen)."""
    totals = [sum(signed) for signed in itertools.product(*((s, -s) for s in sums))]
    less = sum(t <= sum(sums) for t in totals) / len(totals)
    greater = sum(t >= sum(sums) for t in totals) / len(totals)
    return min(1, 2 * min(less, greater)), less, greater


def score(b, c, n, d):
    """Tango's z(d)."""

    def unlikely(q):
        terms = ((b, q + d), (c, q), (n - b - c, 1 - 2 * q - d))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    bounds = (max(0.0, -d), (1 - d) / 2)
    q = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * d) / math.sqrt(n * (2 * q + d - d**2))


def tango_end(b, c, n, side):
    """The d farthest on a side (-1: below, 1: above) that is not rejected, by halving."""
    inside, outside = (b - c) / n, float(side)
    for _ in range(40):
        middle = (inside + outside) / 2
        rejected = abs(middle) < 1 and abs(score(b, c, n, middle)) > Z
        inside, outside = (inside, middle) if rejected else (middle, outside)
    return inside


def holm_by_hand(p_values):
    """Adjusted p, in the order given."""
    tested = sorted(p for p in p_values if p is not None)
    steps = [min(1, (len(tested) - i) * p) for i, p in enumerate(tested)]
    raised = dict(zip(tested, itertools.accumulate(steps, max), strict=True))
    return [None if p is None else raised[p] for p in p_values]


def outcomes(b, c, n):
    """Right (1) or wrong (0) under A and under B, for n documents."""
    both = [1] * (n - b - c)
    return [1] * b + [0] * c + both, [0] * b + [1] * c + both


def test_right_answers_are_compared_by_mcnemar_and_their_interval_is_tangos():
    for b, c, n in CASES:
        found = paired("mean", *outcomes(b, c, n))
        assert (found.kind, found.test, found.interval) == ("proportion", "exact McNemar", "Tango")
        assert found.difference == pytest.approx((b - c) / n)
        assert (found.p, found.p_worse) == pytest.approx(mcnemar(b, c), rel=1e-12)
        assert (found.low, found.high) == tango(b, c, n)
        assert found.low == pytest.approx(tango_end(b, c, n, -1), abs=1e-5)
        assert found.high == pytest.approx(tango_end(b, c, n, 1), abs=1e-5)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=40)
def test_sums_of_units_are_tested_by_flipping_signs(sums):
    assert sign_flip(np.array(sums)) == pytest.approx(flipped(sums))
    if set(sums) <= {-1, 0, 1}:
        assert sign_flip(np.array(sums))[:2] == pytest.approx(mcnemar(sums.count(1), sums.count(-1)))


@settings(max_examples=50)
@given(st.lists(st.sampled_from([None, 0.0, 0.01, 0.02, 0.5, 1.0]) | st.floats(0, 1), max_size=12))
def test_several_tests_are_adjusted_by_holm(p_values):
    assert holm(p_values) == pytest.approx(holm_by_hand(p_values))
