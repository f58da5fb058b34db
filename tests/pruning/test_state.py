"""Bookkeeping per sequence: masks, ring buffer, re-masks, copies."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.masks.remask import Due
from dart_eval.pruning.masks.ring import RingBuffer
from tests.helpers.sessions import state_of


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 5))
def test_top_k_keeps_the_largest(seed, size, rows):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (rows, size), generator=generator).float()  # many ties
    keep = torch.randint(0, size + 1, (rows,), generator=generator)
    mask = top_k_mask(scores, keep)
    assert mask.sum(1).tolist() == keep.tolist()
    for row in range(rows):
        kept, dropped = scores[row][mask[row]], scores[row][~mask[row]]
        assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


@given(st.integers(0, 10_000), st.integers(1, 30))
def test_top_k_selects_what_a_stable_sort_would(seed, size):
    """Ties go to the lower index, whatever the row's own count; infinities are numbers, NaN is the largest."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    scores = values[torch.randint(0, 6, (2, 3, size), generator=generator)]
    keep = torch.randint(0, size + 1, (2, 3), generator=generator)
    order = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = order.sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.zeros(2, 3, size, dtype=torch.bool).scatter(-1, order, torch.arange(size) < keep[..., None])
    assert torch.equal(top_k_mask(scores, keep), wanted)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 9).flatmap(lambda n: st.lists(st.booleans(), min_size=2 * n, max_size=2 * n)), max_size=8),
)
def test_the_ring_holds_each_sequences_last_real_inputs_wherever_its_padding_stands(size, writes):
    """Against a deque per sequence; the other sequence's padding takes no slot of it."""
    ring = RingBuffer(size, 2)
    expected = [deque(maxlen=size), deque(maxlen=size)]
    value = 1.0
    for real in writes:
        valid = torch.tensor(real).view(2, -1)
        x = torch.arange(value, value + valid.shape[1]).repeat(2, 1)
        value += valid.shape[1]
        for layer in range(2):
            ring.write(layer, x.masked_fill(~valid, torch.nan)[..., None] * (layer + 1), valid)
        ring.advance(valid)
        for row in range(2):
            expected[row].extend(x[row][valid[row]].tolist())
    for row in range(2):
        for layer in range(2 if writes else 0):
            held = ring.slots[layer][row, :, 0][ring.valid[row]] / (layer + 1)
            assert sorted(held.tolist()) == list(expected[row])


@pytest.mark.parametrize("method", ["dart", "griffin"])
def test_scores_equal_the_formula_and_ignore_padding(llama, method):
    state = state_of(method, llama, batch=2)
    size = find_ffns(llama)[0].size
    h = torch.randn(2, 9, size) * 3
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = False
    h[0, :4] = torch.nan
    for layer in range(3):
        state.observe(layer, h[:, :5], valid[:, :5])  # in chunks
        state.observe(layer, h[:, 5:], valid[:, 5:])
    for row, first in ((0, 4), (1, 0)):
        total = torch.zeros(size, dtype=torch.float64)
        for t in range(first, 9):
            token = h[row, t].double()
            total += (token / token.norm()) ** 2 if method == "griffin" else token**2
        assert torch.allclose(state.layers[0].sums["score"][row].double(), total, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_squares_are_kept_in_fp32(llama, dtype):
    """1e-4 squared vanishes in fp16 and 300 squared overflows; neither may be lost."""
    state = state_of("dart", llama)
    h = torch.full((1, 4000, find_ffns(llama)[0].size), 1e-4, dtype=dtype)
    h[..., 1] = 300.0
    state.observe(0, h, torch.ones(1, 4000, dtype=torch.bool))
    energy = state.layers[0].sums["score"][0]
    assert energy.dtype == torch.float32
    assert float(energy[0]) == pytest.approx(4000 * float(h[0, 0, 0]) ** 2, rel=1e-3)
    assert float(energy[1]) == pytest.approx(4000 * 300.0**2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sensitivity", ["ffn", "residual"])
def test_a_layers_sensitivity_is_made_in_fp32(llama, dtype, sensitivity):
    """Also of the stream after the FFN, where that is what counts."""
    valid = torch.ones(1, 7, dtype=torch.bool)
    state = state_of("dart", llama, **{"allocation.sensitivity": sensitivity})
    y, z = torch.randn(1, 7, 32).to(dtype), torch.randn(1, 7, 32).to(dtype)
    state.observe_change(1, y, z, valid)
    state.change.finish(valid)
    y, z = y[0].double(), z[0].double()
    z = y + z if sensitivity == "residual" else z
    turn = 1 - torch.cosine_similarity(y, z, dim=1).mean()
    assert state.change.sensitivity(slice(None))[1] == pytest.approx(
        float(turn * ((z - y).norm(dim=1) / y.norm(dim=1)).mean()), rel=1e-5
    )


def _turned(model, **params):
    """A state that saw, per layer, one token whose FFN turns the stream by 90, 180, 90 degrees.

    The outputs' lengths make r = ||z - y|| / ||y||: y has length 5; z of length 12, 0.5 and 5 sqrt(3) give 13, 5.5, 10.
    """
    state = state_of("dart", model, **params)
    y = torch.zeros(1, 1, 32)
    y[..., 0] = 5
    for layer, (axis, length) in enumerate(((1, 12.0), (0, -0.5), (1, 75**0.5))):
        z = torch.zeros(1, 1, 32)
        z[..., axis] = length
        state.observe(layer, torch.ones(1, 1, 40), torch.ones(1, 1, dtype=torch.bool))
        state.observe_change(layer, y, z, torch.ones(1, 1, dtype=torch.bool))
    state.finish_context(torch.ones(1, 1, dtype=torch.bool))
    return state


def test_magnitude_and_protection_are_used(llama):
    """Both ablations by hand: three layers (depths 0, 1/2, 1) of 40 neurons, budget 1.5."""
    full = _turned(llama)
    assert full.change.sensitivity(slice(0, 1)) == pytest.approx([13 / 5, 2 * 5.5 / 5, 10 / 5])
    bare = _turned(llama, **{"allocation.magnitude": False})
    assert bare.change.sensitivity(slice(0, 1), magnitude=False) == pytest.approx([1, 2, 1])  # 1 - cos alone

    # S normalised 1, 1/3, 0; weights 0, 2/3, .35 -> prune 0, .984, .516, clipped .1, .9, .516; the surplus .016 is
    # taken 2/3 : .35 from the last two: .889, .511, of 40 neurons 4.4 and 19.6 kept
    assert full.mask_counts[0].tolist() == [36, 4, 20]
    # normalised 0, 1, 0; weights 1/4, 0, .35 -> .625, 0, .875; the middle is raised to .1, the others give 5:7
    assert bare.mask_counts[0].tolist() == [17, 36, 7]
    # weights 0, 2/3, 1 -> 0, .6, .9, clipped .1, .6, .9; weights 2:3 give .1: .56, .84
    assert _turned(llama, **{"allocation.protect": False}).mask_counts[0].tolist() == [36, 18, 6]
    # weights 1, 0, 1 -> .75, 0, .75; the middle is raised to .1
    neither = {"allocation.protect": False, "allocation.magnitude": False}
    assert _turned(llama, **neither).mask_counts[0].tolist() == [12, 36, 12]
    assert _turned(llama, allocation="uniform").mask_counts[0].tolist() == [20, 20, 20]


def test_a_remask_blends_recent_scores_and_keeps_the_counts(llama):
    params = {"remask.ring": 4, "remask.blend": 0.25, "remask.window": 2, "compensation": "mean"}
    state = state_of("dart", llama.float(), batch=2, **params)
    ring = state.remasking.ring
    ffns = find_ffns(llama)
    valid = torch.ones(2, 6, dtype=torch.bool)
    torch.manual_seed(1)
    for ffn in ffns:
        ring.write(ffn.layer, torch.randn(2, 6, 32), valid)
        state.observe(ffn.layer, torch.randn(2, 6, ffn.size), valid)
        state.observe_change(ffn.layer, torch.randn(2, 6, 32), torch.randn(2, 6, 32), valid)
    state.observe_attention(torch.randn(2, 6, 32), valid)
    state.finish_context(valid)
    before, means = [m.clone() for m in state.masks], [layer.sums["compensation"] / 6 for layer in state.layers]
    constants = [layer.constant.clone() for layer in state.layers]
    recent = [torch.randn(2, 3, 32) for _ in ffns]
    last_of_prompt = [slots.clone() for slots in ring.slots]
    new = torch.ones(2, 3, dtype=torch.bool)
    for ffn, x in zip(ffns, recent, strict=True):
        ring.write(ffn.layer, x, new)
    ring.advance(new)
    state.remask(Due(torch.tensor([True, False]), "alarm"))
    for i, ffn in enumerate(ffns):
        # the ring of four: the prompt's last input and the three new ones
        x = torch.cat([last_of_prompt[i][0][[int(ring.next[0]) % 4]], recent[i][0]])
        h = ffn.intermediate(x)
        score = 0.25 * state.layers[i].sums["score"][0] / 6 + 0.75 * h.square().sum(0) / 4
        wanted = top_k_mask(score[None], state.mask_counts[:1, i])[0]
        assert torch.equal(state.masks[i][0], wanted)
        mean = 0.25 * means[i][0] + 0.75 * h.mean(0)
        assert torch.allclose(state.layers[i].sums["compensation"][0] / 6, mean, atol=1e-6)
        assert torch.allclose(state.layers[i].constant[0], ffn.down(mean * ~wanted), atol=1e-6)
        assert torch.equal(state.layers[i].constant[1], constants[i][1])
        assert torch.equal(state.masks[i][1], before[i][1])
        assert int(state.masks[i][0].sum()) == int(before[i][0].sum())
    assert state.remasks.tolist() == [1, 0]


def test_a_copy_shares_nothing_that_changes(llama):
    state = state_of("dart", llama.float(), **{"remask.ring": 4, "remask.window": 2})
    valid = torch.ones(1, 6, dtype=torch.bool)
    for ffn in find_ffns(llama):
        state.remasking.ring.write(ffn.layer, torch.randn(1, 6, 32), valid)
        state.observe(ffn.layer, torch.randn(1, 6, ffn.size), valid)
        state.observe_change(ffn.layer, torch.randn(1, 6, 32), torch.randn(1, 6, 32), valid)
    state.finish_context(valid)
    before = [m.clone() for m in state.masks]
    copy = state.select(torch.tensor([0, 0]))
    new = torch.ones(2, 3, dtype=torch.bool)
    for ffn in find_ffns(llama):
        copy.remasking.ring.write(ffn.layer, 5 * torch.randn(2, 3, 32), new)
    copy.remasking.ring.advance(new)
    copy.remask(Due(torch.tensor([True, True]), "alarm"))
    assert any(not torch.equal(m[0], b[0]) for m, b in zip(copy.masks, before, strict=True))
    assert all(torch.equal(m, b) for m, b in zip(state.masks, before, strict=True))
    assert state.remasks.tolist() == [0]
    assert state.remasking.ring.next.tolist() == [2] and copy.remasking.ring.next.tolist() == [1, 1]
