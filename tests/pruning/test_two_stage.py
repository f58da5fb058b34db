"""Masks inside which each token picks its neurons: exact counts, the formula, equal weights read."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Phi3Config

from dart_eval.allocation import StageCounts, stage_counts
from dart_eval.ffn import cache_argument, find_ffns
from dart_eval.pruning.masks import pick
from tests.helpers.models import SMALL, random_tokens, tiny
from tests.helpers.sessions import cache_of, open_session


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


def phi3():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Phi3Config(**SMALL)).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: tiny("gemma3"), lambda: tiny("gpt2"), phi3])
def test_a_decoded_token_uses_the_neurons_that_the_formula_picks(make):
    """Step by step with a copy of the model: h is zeroed for the token at hand, the mean of the rest is added."""
    model, reference = make(), make()
    for p in (p for p in model.parameters() if p.dim() == 1):  # biases are born zero, and would not be missed
        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)), dtype=p.dtype)
    reference.load_state_dict(model.state_dict())
    ids, token = torch.tensor([random_tokens(20, seed=3)]), torch.tensor([[7]])
    ups, means, ffns = [], [], find_ffns(reference)
    inputs = {}
    handles = [f.block.register_forward_pre_hook(lambda _m, a, i=f.layer: inputs.__setitem__(i, a[0])) for f in ffns]
    reference(ids)
    for f in ffns:
        act, up = f.parts(inputs[f.layer])
        means.append((act if up is None else act * up)[0].mean(0))
        ups.append(None if up is None else up[0].float().square().sum(0).sqrt())
    for handle in handles:
        handle.remove()

    with open_session(model, "dart-plus", 0.5, detect=False, every=0, stages=1.4, down=0.5) as session:
        out = model(ids, use_cache=True)
        masks = [m[0].clone() for m in session.state.masks]
        picked, written = session.state.picked[0].tolist(), session.state.written[0].tolist()
        ours = model(token, use_cache=True, **{cache_argument(model): cache_of(out)}).logits
        read = session.weights_read

    def zero(f):
        def hook(_module, args):
            x = args[0]
            a, _ = f.parts(inputs[f.layer].reshape(1, 1, -1))
            a = a.flatten().float().abs()
            score = a if ups[f.layer] is None else a * ups[f.layer]
            keep = score.masked_fill(~masks[f.layer], -1).topk(picked[f.layer]).indices
            if f.matrices == 3:
                keep = keep[x.flatten()[keep].abs().topk(written[f.layer]).indices]
            out = torch.zeros_like(x)
            out[..., keep] = x[..., keep]
            return (out,)

        return hook

    def make_up(f):
        outside = means[f.layer].masked_fill(masks[f.layer], 0)
        return lambda _module, _args, output: output + f.output_weight() @ outside

    out = reference(ids, use_cache=True)
    handles = [f.block.register_forward_pre_hook(lambda _m, a, i=f.layer: inputs.__setitem__(i, a[0])) for f in ffns]
    handles += [f.down.register_forward_pre_hook(zero(f)) for f in ffns]
    handles += [f.down.register_forward_hook(make_up(f)) for f in ffns]
    theirs = reference(token, use_cache=True, **{cache_argument(reference): cache_of(out)}).logits
    assert torch.allclose(ours, theirs, atol=1e-8)
    neurons, m = sum(f.size for f in ffns), ffns[0].matrices
    rows = sum(int(x.sum()) for x in masks) + sum(picked) + (sum(written) if m == 3 else 0)
    assert rows == m * round(0.5 * neurons)
    assert read == pytest.approx(0.5)
    assert sum(int(x.sum()) for x in masks) > 0.6 * neurons  # wider than one stage
