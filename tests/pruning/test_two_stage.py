"""Masks inside which each token picks its neurons: exact counts, equal weights read.

The formula: tests/derivations/test_dart_plus.py.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dart_eval.allocation import StageCounts, stage_counts
from dart_eval.pruning.masks import pick


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
    for share in (down, 1.0):
        found = stage_counts(ratios, sizes, sparsity, spread, matrices, share)
        mask, picked, written = found.mask, found.picked, found.written
        read = sum(mask) + sum(picked) + (sum(written) if matrices == 3 else 0)
        assert read == matrices * round((1 - sparsity) * sum(sizes))
        assert all(0 <= w <= p <= m <= n for w, p, m, n in zip(written, picked, mask, sizes, strict=True))
        assert sum(mask) >= round((1 - sparsity) * sum(sizes))
        if matrices == 2 or share == 1:
            assert sum(written) == sum(picked)
        elif all(p < m for p, m in zip(picked, mask, strict=True)):  # every mask had enough to pick
            assert abs(sum(written) - share * sum(picked)) <= 2


def test_counts_by_hand():
    """Half of the weights of 2 x 100 neurons, mask 1.3 times that: 65 gates, and (150 - 65) / 2 rows of up and down."""
    half = [0.5, 0.5], [100, 100], 0.5
    assert stage_counts(*half, 1.3, 3) == StageCounts([65, 65], [43, 42], [43, 42])
    assert stage_counts([1.0, 1.0], [100, 100], 0.0, 1.3, 3) == StageCounts(*[[100, 100]] * 3)
    assert stage_counts(*half, 9.0, 3) == StageCounts([100, 100], [25, 25], [25, 25])  # the gate dense
    # Three stages, 150 rows a layer: 80 gates, then 70 rows of which down has 0.6 times as many as up.
    assert stage_counts(*half, 1.6, 3, 0.6) == StageCounts([80, 80], [44, 44], [26, 26])
    assert stage_counts(*half, 1.0, 3, 0.6) == StageCounts([50, 50], [50, 50], [50, 50])  # a mask alone
    assert stage_counts(*half, 1.6, 2, 0.6) == StageCounts([80, 80], [20, 20], [20, 20])  # no gate: two stages


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.floats(1.0, 4.0),
    st.sampled_from([2, 3]),
    st.floats(0.05, 1.0),
)
def test_every_layer_reads_its_share(shares, sparsity, spread, matrices, down):
    """Also where a layer's mask ends at all its neurons: no other layer pays for it. Off by rounding alone."""
    size, scale = 1000, (1 - sparsity) * len(shares) / sum(shares)
    ratios = [r * scale for r in shares]
    assume(max(ratios) <= 1)
    for share in (down, 1.0):
        found = stage_counts(ratios, [size] * len(ratios), sparsity, spread, matrices, share)
        later = [found.picked, found.written] if matrices == 3 else [found.picked]
        for ratio, *rows in zip(ratios, found.mask, *later, strict=True):
            assert abs(sum(rows) - matrices * ratio * size) <= 4


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 4))
def test_each_token_picks_exactly_its_count_inside_the_mask(seed, size, tokens):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, tokens, size), generator=generator).float()  # many ties, many zeros
    mask = torch.rand(2, size, generator=generator) < 0.6
    keep = (mask.sum(1) * torch.rand(2, generator=generator)).long()
    kept = pick(scores, mask[:, None], keep)
    assert torch.equal(kept.sum(-1), keep[:, None].expand(2, tokens))
    assert not (kept & ~mask[:, None]).any()
    for row in range(2):
        for t in range(tokens):
            inside = mask[row] & ~kept[row, t]
            if kept[row, t].any() and inside.any():
                assert scores[row, t][kept[row, t]].min() >= scores[row, t][inside].max()
