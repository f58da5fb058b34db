"""Paired tests against other implementations, simulation, and what must not change them.

What the exact ones mean: tests/derivations/test_paired.py.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as theirs

from dart_eval.results import stats, sums
from dart_eval.results.stats import bootstrap_t, holm, paired, tango


def right_and_wrong(b, c, n):
    """0/1 values with b documents right under A only, c under B only."""
    a = np.array([1] * b + [0] * c + [1] * (n - b - c))
    return a, np.array([0] * b + [1] * c + [1] * (n - b - c))


def pairs_of(seed, n=40):
    generator = np.random.default_rng(seed)
    w = generator.integers(50, 800, n).astype(float)
    return np.stack([-w * generator.gamma(9, 0.35, n), w], 1)


def counts_of(seed, n=30):
    """BLEU's counts of documents of 10 to 30 words."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        hyp, ref = generator.integers(10, 30, 2)
        totals = [hyp - k for k in range(4)]
        rows.append([hyp, ref, *(generator.binomial(t, 0.6 ** (k + 1)) for k, t in enumerate(totals)), *totals])
    return np.array(rows, float)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=6, max_size=60))
@settings(max_examples=50, deadline=None)
def test_clusters_of_one_are_no_clusters(values):
    a, b = np.array(values).T
    assert paired("mean", a, b, [f"c{i}" for i in range(len(a))]) == paired("mean", a, b)


def test_clusters_count_once_however_many_documents_they_have():
    a, b = right_and_wrong(12, 0, 60)
    doubled = np.repeat(a, 5), np.repeat(b, 5)
    clusters = np.repeat(np.arange(60), 5)
    alone, together, naive = paired("mean", a, b), paired("mean", *doubled, clusters), paired("mean", *doubled)
    assert together.p == pytest.approx(alone.p)
    assert together.difference == alone.difference
    assert (together.n, together.clusters, together.test) == (300, 60, "exact sign flip of clusters")
    assert naive.p < 1e-6 * together.p
    assert together.low < 0.2 < together.high
    assert together.high - together.low > 1.5 * (naive.high - naive.low)


def test_no_interval_of_accuracies_has_width_zero():
    ones = np.ones(40)
    for clusters, units in ((None, 40), (np.repeat(np.arange(10), 4), 10)):
        found = paired("mean", ones, ones, clusters)
        z = theirs.norm.ppf(0.975) ** 2
        assert (found.difference, found.p, found.p_worse) == (0, 1, 1)
        assert (found.low, found.high) == pytest.approx((-z / (units + z), z / (units + z)))


@pytest.mark.parametrize(("both", "a_only", "b_only"), [(0.5, 0.1, 0.1), (0.4, 0.25, 0.05), (0.9, 0.02, 0.02)])
def test_tango_covers(both, a_only, b_only):
    generator = np.random.default_rng(1)
    draws = generator.multinomial(40, [a_only, b_only, both, 1 - both - a_only - b_only], 400)
    intervals = {(b, c): tango(b, c, 40) for b, c in {(b, c) for b, c, *_ in draws.tolist()}}
    found = [intervals[b, c] for b, c, *_ in draws.tolist()]
    assert np.mean([low <= a_only - b_only <= high for low, high in found]) > 0.92


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_on_normal_data_the_bootstrap_agrees_with_the_t_test(shift):
    generator = np.random.default_rng(5)
    a = generator.normal(shift, 1, 60)
    b = generator.normal(0, 1, 60)
    found, expected = paired("mean", a, b), theirs.ttest_rel(a, b)
    assert found.test == found.interval == "bootstrap-t"
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.03)
    assert found.effect == pytest.approx(expected.statistic / math.sqrt(60))
    assert found.p_worse == pytest.approx(theirs.ttest_rel(a, b, alternative="less").pvalue, abs=0.02)


@pytest.mark.parametrize(("n", "draw", "most"), [
    (12, "normal", 0.05), (12, "exponential", 0.085), (30, "exponential", 0.07), (30, "mostly equal", 0.05),
])  # fmt: skip
def test_false_alarms_and_coverage_on_skewed_data(n, draw, most):
    """The rates measured over many runs are in docs/numbers.md."""
    generator = np.random.default_rng(2)
    makers = {
        "normal": lambda: generator.normal(size=n),
        "exponential": lambda: generator.exponential(size=n) - 1,
        "mostly equal": lambda: generator.normal(size=n) * (generator.random(n) < 0.3),
    }
    alarms = one_sided = covered = 0
    runs = 500
    for _ in range(runs):
        d = makers[draw]()
        found = bootstrap_t((d - d.mean()) / n, d.mean(), resamples=499)
        alarms += found.p < 0.05
        one_sided += min(found.p_less, found.p_greater) < 0.025
        covered += found.low is None or found.low <= 0 <= found.high
    bound = theirs.binom.ppf(0.999, runs, most)
    assert alarms <= bound
    assert one_sided <= bound
    assert covered >= runs - bound


def test_unequal_clusters_do_not_raise_false_alarms():
    generator = np.random.default_rng(3)
    alarms = naive = 0
    for _ in range(300):
        sizes = generator.integers(1, 8, 20)
        clusters = np.repeat(np.arange(20), sizes)
        d = np.repeat(generator.normal(size=20), sizes) + generator.normal(size=len(clusters)) / 3
        u = np.bincount(clusters, (d - d.mean()) / len(d))
        alarms += bootstrap_t(u, d.mean(), resamples=499).p < 0.05
        naive += theirs.ttest_1samp(d, 0).pvalue < 0.05
    assert alarms <= theirs.binom.ppf(0.999, 300, 0.07)
    assert naive > 2 * alarms


def test_equal_values_differ_by_nothing():
    found = paired("mean", [0.2, 0.4, 0.1, 0.6, 0.3, 0.9], [0.2, 0.4, 0.1, 0.6, 0.3, 0.9])
    assert (found.difference, found.low, found.high, found.p, found.p_worse, found.effect) == (0, 0, 0, 1, 1, None)


def test_one_changed_document_proves_nothing():
    b = np.linspace(0.1, 0.9, 12)
    a = np.where(np.arange(12) == 3, 0, b)
    found = paired("mean", a, b)
    assert found.p > 0.3  # resamples without it have no spread: they count against the difference
    assert found.low is found.high is None and found.reason == "too few units differ"


LINE, PAIRS, FIFTHS = np.linspace(0, 1, 20), pairs_of(0, 10), [i % 5 for i in range(10)]
MORE = PAIRS * np.linspace(1, 1.1, 10)[:, None] ** [1, 0]


@pytest.mark.parametrize(("kind", "a", "b", "clusters", "difference", "reason"), [
    ("mean", LINE + 0.25, LINE, None, 0.25, "same difference everywhere"),
    ("mean", np.arange(10.0), np.arange(10.0) * np.linspace(1, 1.1, 10), FIFTHS, -0.3167, "5 independent units"),
    ("log-perplexity", PAIRS, MORE, FIFTHS, (MORE - PAIRS)[:, 0].sum() / PAIRS[:, 1].sum(), "5 independent units"),
    ("mean", np.array([math.nan, *range(9)]), np.arange(10.0), None, None, "not finite"),
])  # fmt: skip
def test_what_cannot_be_tested_has_a_difference_and_a_reason(kind, a, b, clusters, difference, reason):
    found = paired(kind, a, b, clusters)
    assert found.p is found.p_worse is found.low is found.high is None and reason in found.reason
    if difference is not None:
        assert found.difference == pytest.approx(difference, rel=1e-3)


def test_values_of_which_some_are_0_and_1_are_no_right_and_wrong_answers():
    assert paired("mean", [0.0, 1.0, 0.5] * 4, [1.0, 0.0, 0.25] * 4).kind == "mean"


def test_the_size_of_a_chunk_does_not_move_p(monkeypatch):
    u = np.random.default_rng(0).normal(size=30)
    first = bootstrap_t(u, 0.1)
    monkeypatch.setattr(stats, "CHUNK", 100)
    assert first == bootstrap_t(u, 0.1)


def test_perplexities_are_compared_on_the_log_scale():
    a = pairs_of(1)
    b = np.stack([a[:, 0] * 0.97, a[:, 1]], 1)
    found = paired("log-perplexity", a, b, higher_is_better=False)
    direct = [-x[:, 0].sum() / x[:, 1].sum() for x in (a, b)]
    assert found.difference == pytest.approx(direct[0] - direct[1])
    assert (found.value_a, found.value_b) == pytest.approx(tuple(np.exp(direct)))
    assert found.ratio == pytest.approx(found.value_a / found.value_b)
    assert found.p_worse < 1e-3
    in_bits = paired("bits", a, b, higher_is_better=False)
    assert in_bits.difference == pytest.approx(found.difference / math.log(2))
    assert in_bits.p == found.p


@pytest.mark.parametrize("kind", ["mean", "ratio", "log-perplexity", "bits"])
def test_influence_values_are_the_derivatives_by_the_weights_of_documents(kind):
    """Numerically: the value where one document counts a little more and a little less."""
    pairs, step = pairs_of(3, 60), 1e-5
    value, influence = sums.linearised(kind, pairs)
    for i in range(len(pairs)):
        ends = []
        for sign in (1, -1):
            weight = np.ones(len(pairs))
            weight[i] += sign * step
            ends.append(sums.linearised(kind, pairs * weight[:, None])[0])
        assert influence[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-9 * abs(value))
    assert influence.sum() == pytest.approx(0, abs=1e-9 * abs(value))


@pytest.mark.parametrize("kind", ["ratio", "log-perplexity"])
def test_the_linearised_spread_is_that_of_a_bootstrap(kind):
    pairs, n = pairs_of(7, 120), 120
    generator = np.random.default_rng(0)
    drawn = [sums.linearised(kind, pairs[generator.integers(0, n, n)])[0] for _ in range(400)]
    influence = sums.linearised(kind, pairs)[1]
    assert math.sqrt(influence @ influence) == pytest.approx(np.std(drawn), rel=0.12)


def test_the_error_of_bleu_is_that_of_a_bootstrap():
    sacrebleu = pytest.importorskip("sacrebleu")
    counts, n = counts_of(7, 120), 120
    generator = np.random.default_rng(0)

    def bleu(rows):
        hyp, ref, *grams = rows.sum(0).astype(int).tolist()
        return sacrebleu.metrics.BLEU.compute_bleu(grams[:4], grams[4:], hyp, ref, smooth_method="exp").score

    drawn = [bleu(counts[generator.integers(0, n, n)]) for _ in range(400)]
    assert sums.bleu_error(counts.astype(int)) == pytest.approx(np.std(drawn), rel=0.12)


def test_members_that_weigh_equally():
    """Thirty documents of one task and ten of another: x and w are divided by the size of the task."""
    a, b = np.array([1.0] * 30 + [0.0] * 10), np.zeros(40)
    weight = np.array([1 / 30] * 30 + [1 / 10] * 10)
    sides = [np.stack([values * weight, weight], 1) for values in (a, b)]
    assert paired("mean", *sides).difference == pytest.approx(0.5)
    assert paired("mean", a, b).difference == pytest.approx(0.75)
    assert paired("mean", *sides).kind == "mean"  # McNemar's test knows no weights


MAKERS = {
    "proportion": lambda seed: np.random.default_rng(seed).integers(0, 2, 40).astype(float),
    "mean": lambda seed: np.random.default_rng(seed).gamma(2, 1, 40),
    "ratio": pairs_of,
    "log-perplexity": pairs_of,
}


@pytest.mark.parametrize("clusters", [None, [i // 3 for i in range(40)]])
@pytest.mark.parametrize("kind", MAKERS)
def test_swapping_the_sides_flips_signs_and_nothing_else(kind, clusters):
    a, b = MAKERS[kind](1), MAKERS[kind](2)
    name = "mean" if kind == "proportion" else kind
    one, two = paired(name, a, b, clusters), paired(name, b, a, clusters, higher_is_better=False)
    assert one.kind == kind
    assert two.difference == -one.difference
    assert (two.low, two.high) == pytest.approx((-one.high, -one.low))
    assert (two.p, two.p_worse) == pytest.approx((one.p, one.p_worse))
    assert two.effect == pytest.approx(-one.effect)
    if one.ratio:
        assert two.ratio == pytest.approx(1 / one.ratio)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_order_of_documents_does_not_matter(kind):
    a, b = MAKERS[kind](3), MAKERS[kind](4)
    clusters = np.array([i // 3 for i in range(40)])
    order = np.random.default_rng(0).permutation(40)
    name = "mean" if kind == "proportion" else kind
    one, two = paired(name, a, b, clusters), paired(name, a[order], b[order], clusters[order])
    for x, y in zip(vars(one).values(), vars(two).values(), strict=True):
        assert x == (pytest.approx(y, rel=1e-6) if isinstance(y, float) else y)


def test_the_same_call_gives_the_same_numbers_and_without_a_direction_no_one_sided_p():
    a, b = MAKERS["mean"](1), MAKERS["mean"](2)
    assert paired("mean", a, b) == paired("mean", a, b)
    assert paired("mean", a, b, higher_is_better=None).p_worse is None


@pytest.mark.slow
def test_statsmodels_agrees_on_mcnemar_and_holm():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for b, c, n in [(0, 0, 12), (3, 1, 20), (2, 12, 50), (40, 20, 160), (7, 0, 30), (5, 5, 10), (6, 0, 6)]:
        expected = tables.mcnemar([[n - b - c, b], [c, 0]], exact=True).pvalue
        assert paired("mean", *right_and_wrong(b, c, n)).p == pytest.approx(min(1.0, expected))
    # One call: statsmodels collects all of Python's garbage in each.
    p_values = [*np.random.default_rng(0).random(8).round(2) / 10, 0.001, 0.001, 0.0, 1.0]
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())


def test_the_bootstrap_divides_by_the_error_of_so_many_units():
    """Of eight units, by hand over the same resamples: t is a sum over the root of n / (n - 1) squared deviations."""
    units = np.random.default_rng(3).normal(size=8)
    units -= units.mean()

    def error(x):
        return np.sqrt(8 / 7 * np.square(x - x.mean()).sum())

    drawn = np.sort(units)[np.random.default_rng(5).integers(0, 8, (999, 8), dtype=np.int32)]
    sizes = np.sort([abs(x.sum()) / error(x) for x in drawn])
    found = bootstrap_t(units, 1.3, resamples=999, seed=5)
    assert found.p == (1 + (sizes >= 1.3 / error(units)).sum()) / 1000
    margin = sizes[949] * error(units)
    assert (found.low, found.high) == pytest.approx((1.3 - margin, 1.3 + margin))
