"""Masks inside which each token chooses its neurons: exact counts, equal weights read.

The formula: tests/derivations/test_dart_choice.py.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dart_eval.kernels.top import largest
from dart_eval.pruning.masks.counts import Budget, Counts, chosen_counts


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 1.0)), min_size=1, max_size=8),
    st.floats(0, 0.95),
    st.floats(1.0, 4.0),
    st.sampled_from([2, 3]),
    st.floats(0.05, 1.0),
)
def test_counts_meet_the_weights_read_exactly(layers, sparsity, spread, matrices, down):
    sizes = [n for n, _ in layers]
    scale = (1 - sparsity) * sum(sizes) / sum(n * r for n, r in layers)
    ratios = [min(1.0, r * scale) for _, r in layers]
    spent = max(r * scale for _, r in layers) <= 1  # else the ratios are fewer neurons than the sparsity leaves
    for share in (down, 1.0):
        found = chosen_counts(Budget(ratios, sizes, sparsity, matrices), 1, spread, share)
        mask, taken, written = found.mask, found.taken, found.written
        read = sum(mask) + sum(taken) + (sum(written) if matrices == 3 else 0)
        assert read == matrices * round((1 - sparsity) * sum(sizes))
        assert all(0 <= w <= p <= m <= n for w, p, m, n in zip(written, taken, mask, sizes, strict=True))
        assert sum(mask) >= round((1 - sparsity) * sum(sizes))
        if matrices == 2 or share == 1:
            assert sum(written) == sum(taken)
        elif spent and all(p < m for p, m in zip(taken, mask, strict=True)):  # every mask had enough to take
            assert abs(sum(written) - share * sum(taken)) <= 2


def test_counts_by_hand():
    """Half of the weights of 2 x 100 neurons, mask 1.3 times that: 65 gates, and (150 - 65) / 2 rows of up and down."""
    half = [0.5, 0.5], [100, 100], 0.5
    assert chosen_counts(Budget(*half, 3), 1, 1.3, 1) == Counts([65, 65], [43, 42], [43, 42], 1)
    assert chosen_counts(Budget([1.0, 1.0], [100, 100], 0.0, 3), 1, 1.3, 1) == Counts(*[[100, 100]] * 3, 1)
    assert chosen_counts(Budget(*half, 3), 1, 9.0, 1) == Counts([100, 100], [25, 25], [25, 25], 1)  # the gate dense
    # Gate, up and down, 150 rows a layer: 80 gates, then 70 rows of which down has 0.6 times as many as up.
    assert chosen_counts(Budget(*half, 3), 1, 1.6, 0.6) == Counts([80, 80], [44, 44], [26, 26], 1)
    assert chosen_counts(Budget(*half, 3), 1, 1.0, 0.6) == Counts([50, 50], [50, 50], [50, 50], 1)  # a mask alone
    assert chosen_counts(Budget(*half, 2), 1, 1.6, 0.6) == Counts([80, 80], [20, 20], [20, 20], 1)  # no gate
    # A mask of everything: 200 of the 300 rows' budget for the gate whole, a quarter of up and down each.
    assert chosen_counts(Budget(*half, 3), 1, None, 1) == Counts([100, 100], [25, 25], [25, 25], 1)
    # Nothing is read whole: the mask is wider, and what is taken is what a mask alone would keep.
    assert chosen_counts(Budget(*half, 3), 0, None, 1) == Counts([100, 100], [50, 50], [50, 50], 0)
    assert chosen_counts(Budget(*half, 3), 0, 1.6, 1) == Counts([80, 80], [50, 50], [50, 50], 0)
    assert chosen_counts(Budget(*half, 3), 0, 1.6, 0.5) == Counts([80, 80], [60, 60], [30, 30], 0)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.floats(1.0, 4.0),
    st.sampled_from([(2, 1), (2, 0), (3, 1), (3, 0), (3, 2)]),
    st.floats(0.05, 1.0),
)
def test_every_layer_reads_its_share(shares, sparsity, spread, read_whole, down):
    """Also where a layer's mask ends at all its neurons: no other layer pays for it. Off by rounding alone."""
    matrices, whole = read_whole
    size, scale = 1000, (1 - sparsity) * len(shares) / sum(shares)
    ratios = [r * scale for r in shares]
    assume(max(ratios) <= 1)
    for share in (down, 1.0):
        found = chosen_counts(Budget(ratios, [size] * len(ratios), sparsity, matrices), whole, spread, share)
        for ratio, mask, taken, written in zip(ratios, found.mask, found.taken, found.written, strict=True):
            read = whole * mask + (matrices - 1 - whole) * taken + written
            assert abs(read - matrices * ratio * size) <= 6


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 4))
def test_each_token_takes_exactly_its_count_inside_the_mask(seed, size, tokens):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, tokens, size), generator=generator).float()  # many ties, many zeros
    mask = torch.rand(2, size, generator=generator) < 0.6
    keep = (mask.sum(1) * torch.rand(2, generator=generator)).long()
    kept = largest(scores, mask[:, None], keep)
    assert torch.equal(kept.sum(-1), keep[:, None].expand(2, tokens))
    assert not (kept & ~mask[:, None]).any()
    for row in range(2):
        for t in range(tokens):
            inside = mask[row] & ~kept[row, t]
            if kept[row, t].any() and inside.any():
                assert scores[row, t][kept[row, t]].min() >= scores[row, t][inside].max()
