"""Bookkeeping per sequence: masks, ring buffer, re-masks, copies."""

import gc
import weakref
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.methods.griffin import relative_squares
from dart_eval.pruning.methods.ring import RingBuffer
from dart_eval.pruning.rows import PerSequence, nbytes
from tests.helpers.models import tiny
from tests.helpers.sessions import RESTLESS, VARIED, RandomCalibration, generate, open_session, prompts_of, rows_of


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


@pytest.mark.slow
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


@pytest.mark.parametrize(("dtype", "sensitivity"), [(torch.float16, "ffn"), (torch.bfloat16, "residual")])
def test_a_layers_sensitivity_is_made_in_fp32(llama, dtype, sensitivity):
    """Also of the stream after the FFN, where that is what counts."""
    valid = torch.ones(1, 7, dtype=torch.bool)
    change = rows_of("dart", llama, **{"allocation.sensitivity": sensitivity})[1].change
    y, z = torch.randn(1, 7, 32).to(dtype), torch.randn(1, 7, 32).to(dtype)
    change.observe(1, y, z, valid)
    change.finish(valid)
    y, z = y[0].double(), z[0].double()
    z = y + z if sensitivity == "residual" else z
    turn = 1 - torch.cosine_similarity(y, z, dim=1).mean()
    assert change.sensitivity(slice(None))[1] == pytest.approx(
        float(turn * ((z - y).norm(dim=1) / y.norm(dim=1)).mean()), rel=1e-5
    )


def tensors_of(value, seen=None):
    """Every tensor that rows hold, walked by hand; what a model or a method has is no part of it."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or not isinstance(value, (PerSequence, list, dict)):
        return []
    seen.add(id(value))
    inner = vars(value) if isinstance(value, PerSequence) else value
    inner = inner.values() if isinstance(inner, dict) else inner
    return [t for v in inner for t in tensors_of(v, seen)]


@pytest.mark.parametrize(("method", "params"), [
    *(pytest.param(*v, marks=[pytest.mark.slow] if i % 4 else []) for i, v in enumerate(VARIED)),
])  # fmt: skip
@torch.no_grad()
def test_a_copy_takes_every_tensor_and_all_of_them_are_counted(method, params):
    model = tiny("llama")
    with open_session(model, method, 0.5, execution="masked", **params) as session:
        out = model(prompts_of(3, 20), use_cache=True)
        for _ in range(4):
            out = model(out.logits[:, -1:].argmax(-1), use_cache=True, past_key_values=out.past_key_values)
        rows = session.rows
        held = tensors_of(rows)
        assert rows.nbytes() == sum({t.data_ptr(): t.nbytes for t in held if t.numel()}.values())
        assert session.state_bytes == nbytes(rows) // 3
        per_row = [t for t in held if not any(t is w for windows in _windows(rows) for w in windows)]
        assert all(t.shape[0] == 3 for t in per_row)
        copy = rows.select(torch.tensor([2, 0, 2, 1]))
    taken = tensors_of(copy)
    assert len(taken) == len(held) + len(_windows(rows))  # the windows of a sequence more
    theirs = [t for t in taken if not any(t is w for windows in _windows(copy) for w in windows)]
    for old, new in zip(per_row, theirs, strict=True):
        torch.testing.assert_close(new, old[torch.tensor([2, 0, 2, 1])], rtol=0, atol=0, equal_nan=True)
        assert not old.numel() or new.data_ptr() != old.data_ptr()
    assert len(copy) == 4 and len(rows) == 3


def _windows(rows):
    """The detector's windows of the prompt: one tensor a sequence, of as many as it had."""
    watch = getattr(rows, "watch", None)
    return [] if watch is None else [watch.drift.windows]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dart", "grinqh", "rounding", "flap"])
def test_a_session_keeps_no_model_alive_after_its_block(method):
    """Nor does a cache of codes; and no collection of garbage has to run first."""
    model = tiny("llama")
    alive = weakref.ref(model)
    gc.disable()
    with open_session(model, method, 0.5):
        generate(model, prompts_of(1, 9), 3)
    del model
    gc.enable()
    assert alive() is None


@pytest.mark.parametrize(("method", "params"), [
    *(pytest.param(*m, marks=pytest.mark.slow) for m in (
        ("m-countdown", {}), ("cats", {"choice.threshold": "calibrated"}), ("teal", {}), ("wina", {}), ("grinqh", {}),
    )), ("dart", RESTLESS), ("graded-both", {}),
])  # fmt: skip
def test_a_forward_that_breaks_off_leaves_nothing_behind(method, params):
    """Of a decoded token that ends between gate and down: the next prompt, and what is read, are what they are else."""
    model, prompt, found = tiny("llama"), prompts_of(1, 12), []

    def broken(_module, _args, output):
        if output.shape[1] == 1:
            raise RuntimeError("out of memory")

    with open_session(model, method, 0.5, execution="masked", **params) as session:
        for breaks in (False, True):
            if breaks:
                handle = model.model.layers[1].mlp.up_proj.register_forward_hook(broken, prepend=True)
                with pytest.raises(RuntimeError, match="out of memory"):
                    generate(model, prompt, 6)
                handle.remove()
            logits = torch.stack(generate(model, prompt, 6).logits)
            found.append((logits, torch.stack([step.read for step in session.steps])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_token_without_activations_counts_nothing():
    assert torch.equal(relative_squares(torch.zeros(1, 2, 3), torch.ones(1, 2)), torch.zeros(1, 3))


def test_random_neurons_differ_from_layer_to_layer_and_from_seed_to_seed(llama):
    calibration = RandomCalibration(llama)
    methods = (rows_of("random", llama, calibration=calibration, **{"score.seed": seed})[0] for seed in (1, 1, 2))
    first, again, other = (method.scores(calibration) for method in methods)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a in first for b in other)
