"""Allocation: the published tables, and budgets that are met exactly."""

import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dart_eval.pruning.masks.allocations import read_table
from dart_eval.pruning.masks.counts import in_steps, keep_counts
from dart_eval.pruning.masks.depth import EPS, depth_aware, normalise_sensitivity
from dart_eval.util.errors import UserError

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
# The same without protection of early and late layers, the ablation of the same scripts ("no border").
UNPROTECTED_50 = [
    0.6137, 0.4198, 0.493, 0.5161, 0.6339, 0.744, 0.7571, 0.7311, 0.7354, 0.6984, 0.7008, 0.6863, 0.6638, 0.648,
    0.6457, 0.5904, 0.514, 0.43, 0.3711, 0.3424, 0.3045, 0.2508, 0.2364, 0.1876, 0.2134, 0.2431, 0.2439, 0.2728,
    0.3009, 0.3946, 0.5172, 0.9,
]  # fmt: skip
UNPROTECTED_70 = [
    0.3868, 0.1, 0.1953, 0.2319, 0.4189, 0.5937, 0.6144, 0.5731, 0.58, 0.5213, 0.5252, 0.5021, 0.4663, 0.4413, 0.4377,
    0.3499, 0.2286, *[0.1] * 13, 0.2336, 0.9,
]  # fmt: skip


def test_the_published_table_at_70_percent():
    keep = depth_aware(LLAMA_8B, 0.7)
    # the table is printed with three decimals
    assert keep == pytest.approx(KEEP_70, abs=2e-4 + 5e-4)
    assert sum(keep) / len(keep) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(("sparsity", "table"), [(0.5, UNPROTECTED_50), (0.7, UNPROTECTED_70)])
def test_the_published_tables_without_protection(sparsity, table):
    keep = depth_aware(LLAMA_8B, sparsity, protect=False)
    assert keep == pytest.approx(table, abs=2e-4)
    assert keep != pytest.approx(depth_aware(LLAMA_8B, sparsity), abs=0.05)


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


@pytest.mark.parametrize("seed", range(20))
def test_counts_in_steps_miss_their_sum_by_less_than_a_step_and_never_exceed_it(seed):
    drawn = random.Random(seed)
    steps = [drawn.choice([1, 2, 4, 8]) if seed % 2 else drawn.choice([2, 4, 8]) for _ in range(9)]
    most = [s * drawn.randint(1, 20) for s in steps]
    counts = [drawn.randint(0, m) for m in most]
    found = in_steps(counts, most, steps)
    assert all(0 <= n <= m and n % s == 0 for n, m, s in zip(found, most, steps, strict=True))
    assert all(abs(n - c) < s for n, c, s in zip(found, counts, steps, strict=True) if s > 1)
    assert 0 <= sum(counts) - sum(found) < max(steps)
    if any(s == 1 and m - n for n, m, s in zip(found, most, steps, strict=True)):
        assert sum(found) == sum(counts)


def test_counts_in_steps_by_hand():
    """19 of 32 in two experts' steps of 2: two layers lose one, and one layer gets it back."""
    assert in_steps([19, 19, 20], [32] * 3, [2] * 3) == [20, 18, 20]
    assert in_steps([19, 19, 20], [32, 32, 24], [2, 2, 1]) == [20, 18, 20]
    assert in_steps([19, 20], [32, 24], [2, 1]) == [18, 21]  # what no expert can take goes to a dense layer
    assert in_steps([15, 10], [32, 40], [8, 8]) == [16, 8]  # most of a step is missing in the first


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=2, max_size=9), st.floats(0.05, 0.85),
    st.booleans(),
)  # fmt: skip
@example([(0.0, 8), (1.0, 1), (1e-05, 2)], 0.0625, False)
def test_layers_of_many_sizes_meet_the_sparsity_of_their_neurons(layers, sparsity, protect):
    sensitivity, sizes = zip(*layers, strict=True)
    keep = depth_aware(normalise_sensitivity(sensitivity), sparsity, protect, sizes)
    low, high = min(0.1, sparsity), max(0.9, sparsity)
    assert all(1 - high - 1e-9 <= k <= 1 - low + 1e-9 for k in keep)
    # A round of redistribution meets the budget, or takes a layer to its bound: ten are enough for nine layers. The
    # rounds end where less than EPS of a layer of mean size is missing.
    ends_at = 1.001 * EPS * sum(sizes) / len(sizes)
    assert sum(k * n for k, n in zip(keep, sizes, strict=True)) == pytest.approx(
        (1 - sparsity) * sum(sizes), rel=1e-12, abs=ends_at
    )
    alike = depth_aware(normalise_sensitivity(sensitivity), sparsity, protect, [7] * len(sizes))
    assert alike == depth_aware(normalise_sensitivity(sensitivity), sparsity, protect)


def test_layers_of_two_sizes_by_hand():
    """Of 400 neurons 200 are pruned: the first layer's most, 90, and 110 of the 300 of the layer that has no weight."""
    assert depth_aware([0, 1], 0.5, False, [100, 300]) == pytest.approx([0.1, 1 - 110 / 300])


@pytest.mark.parametrize("ratios", [[0.5, 1.5], [-0.5, 0.5], ["0.5", 0.5], []])
def test_a_table_of_no_ratios_is_refused(tmp_path, ratios):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"keep": ratios}))
    with pytest.raises(UserError, match=r"is no allocation table: it needs `keep`, a list of ratios in \[0, 1\]"):
        read_table(path)
