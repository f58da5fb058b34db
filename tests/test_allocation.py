"""Allocation: the published tables, and budgets that are met exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dart_eval.allocation import depth_aware, keep_counts, normalise_sensitivity

# Normalised sensitivities of Llama-3.1-8B, and the keep ratios that DART's scripts ship for it at 70 %.
LLAMA_8B = [
    0.5245, 0.2858, 0.3759, 0.4044, 0.5494, 0.6849, 0.7010, 0.6690, 0.6743, 0.6288, 0.6317, 0.6139, 0.5862, 0.5667,
    0.5639, 0.4958, 0.4018, 0.2984, 0.2259, 0.1905, 0.1439, 0.0778, 0.0601, 0.0000, 0.0318, 0.0683, 0.0693, 0.1049,
    0.1395, 0.2548, 0.4057, 1.0000,
]  # fmt: skip
KEEP_70 = [
    0.783, 0.569, 0.531, 0.465, 0.529, 0.624, 0.599, 0.507, 0.467, 0.338, 0.327, 0.294, 0.244, 0.208, 0.203,
    *[0.1] * 14, 0.143, 0.468, 0.9,
]  # fmt: skip


def test_the_published_table_at_70_percent():
    keep = depth_aware(LLAMA_8B, 0.7)
    # the table is printed with three decimals
    assert keep == pytest.approx(KEEP_70, abs=2e-4 + 5e-4)
    assert sum(keep) / len(keep) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
def test_depth_aware_meets_the_budget_within_its_bounds(sparsity):
    keep = depth_aware(LLAMA_8B, sparsity)
    assert sum(keep) / len(keep) == pytest.approx(1 - sparsity, abs=1e-5)
    assert all(0.1 - 1e-9 <= k <= 0.9 + 1e-9 for k in keep)


def test_sparsity_zero_keeps_everything():
    assert depth_aware(LLAMA_8B, 0.0) == [1.0] * 32


def test_sensitive_layers_keep_more():
    keep = depth_aware([0.0, 0.1, 0.1, 0.9, 0.1, 0.1, 0.2], 0.5)
    assert keep[3] == max(keep[2:5])


def test_equal_layers_do_not_divide_by_zero():
    assert normalise_sensitivity([0.3, 0.3, 0.3]) == [0.0, 0.0, 0.0]
    assert sum(depth_aware([1.0, 1.0, 1.0], 0.5)) == pytest.approx(1.5)


layers = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 300)), min_size=1, max_size=12)


@given(layers, st.floats(0, 0.999))
def test_keep_counts_meet_the_label_exactly(pairs, sparsity):
    ratios, sizes = [r for r, _ in pairs], [n for _, n in pairs]
    counts = keep_counts(ratios, sizes, sparsity)
    assert sum(counts) == round((1 - sparsity) * sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))


@given(st.integers(1, 12), st.integers(1, 300), st.floats(0, 0.999))
def test_uniform_counts_differ_by_one_at_most(count, size, sparsity):
    counts = keep_counts([1 - sparsity] * count, [size] * count, sparsity)
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(20, 300), st.floats(0, 0.95))
def test_depth_counts_follow_their_ratios(sensitivity, size, sparsity):
    ratios = depth_aware(normalise_sensitivity(sensitivity), sparsity)
    counts = keep_counts(ratios, [size] * len(ratios), sparsity)
    off = abs(sum(ratios) - (1 - sparsity) * len(ratios)) * size  # what ten rounds of redistribution left over
    assert all(abs(c - r * size) <= 1 + off for c, r in zip(counts, ratios, strict=True))
