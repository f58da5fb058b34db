"""Re-masks while a sequence is decoded: dense tokens, blends, watching only; and what must not change.

The formulas: tests/derivations/test_dart_drift.py.
"""

import pytest
import torch

from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.masks.remask import Due
from dart_eval.pruning.masks.remasks import OnDrift
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of, generate, open_session, prompts_of, state_of

# New masks from the ring at fixed distances, no detector.
STEADY = {"remask": "every", "allocation": "uniform"}


def _masks(session):
    return [m.clone() for m in session.state.masks]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _steps(model, session, ids, tokens):
    """Decode by hand; the masks after each forward."""
    name = cache_argument(model)
    out = model(ids, use_cache=True)
    found = [_masks(session)]
    for token in tokens:
        out = model(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
        found.append(_masks(session))
    return found


@torch.no_grad()
def test_dense_tokens_after_an_alarm_make_the_new_mask(llama):
    """Alarm after three tokens; the next two run dense and alone make the mask; the detector waits for them."""
    tokens = random_tokens(7, seed=9)
    params = {**RESTLESS, "remask.dense_tokens": 2, "remask.blend": 0.0, "remask.cooldown": 5, "allocation": "uniform"}
    hidden = []
    ffn = find_ffns(llama)[1]
    with open_session(llama, "dart", 0.5, execution="masked", **params) as session:
        ffn.down.register_forward_pre_hook(lambda _m, a: hidden.append(a[0][0].clone()), prepend=True)
        found = _steps(llama, session, prompts_of(1, 20), tokens)
    reads = [float(step.read[0]) for step in session.steps]
    assert reads == [0.5, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5]
    assert _equal(found[4], found[0])
    score = torch.cat(hidden[4:6]).float().square().sum(0)
    assert torch.equal(found[5][1], top_k_mask(score[None], torch.tensor([20])))
    assert [(e["cause"], e["token"]) for e in session.events] == [("alarm", 5)]
    assert session.effective_sparsity == pytest.approx(5 * 0.5 / 8)  # the prompt's own token and two dense ones


@torch.no_grad()
def test_tokens_that_run_dense_get_no_constant(llama):
    """What pruned neurons add on average is missing only where they are pruned."""
    made = {"pruned": 0, "dense": 0}
    params = {**RESTLESS, "remask.dense_tokens": 2, "compensation": "mean"}
    ffn = find_ffns(llama)[1]
    with open_session(llama, "dart", 0.5, execution="masked", **params) as session:
        inputs = []
        ffn.down.register_forward_pre_hook(lambda _m, a: inputs.append(a[0]))

        def check(_module, _args, output):
            if session.forward.phase == "decode":
                plain = inputs[-1] @ ffn.down.weight.T
                made["pruned" if torch.allclose(plain, output, atol=1e-9) is False else "dense"] += 1
                assert torch.allclose(plain, output, atol=1e-9) == bool(session.state.dense_now)

        handle = ffn.down.register_forward_hook(check)
        _steps(llama, session, prompts_of(1, 20), random_tokens(9, seed=9))
        handle.remove()
    assert made["pruned"] > 3 and made["dense"] >= 2


def test_windows_that_close_while_dense_tokens_run_raise_no_alarm(llama):
    params = {**RESTLESS, "remask.dense_tokens": 4}  # the alarm comes after token 3; the window of 4 to 6 runs dense
    with open_session(llama, "dart", 0.5, **params) as session:
        _steps(llama, session, prompts_of(1, 20), random_tokens(8, seed=9))
    assert [e["token"] for e in session.events] == [7]
    assert [a["token"] for a in session.log.alarms] == [3]


def test_blend_of_one_is_the_static_mask(llama):
    ids = prompts_of(2, 20)
    with open_session(llama, "dart", 0.5, remask="never"):
        static = generate(llama, ids, tokens=20)
    for params in ({}, {"remask.old": "running"}, {"remask.reference": "kept"}):
        with open_session(llama, "dart", 0.5, **{**RESTLESS, **params, "remask.blend": 1.0}) as session:
            blended = generate(llama, ids, tokens=20)
        assert sum(session.remasks) > 4
        assert torch.equal(torch.stack(static.logits), torch.stack(blended.logits))


def test_watching_only_changes_nothing_but_sees_everything(llama):
    ids = prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, remask="never"):
        static = generate(llama, ids, tokens=16)
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.act": False}) as session:
        watched = generate(llama, ids, tokens=16)
        trace = session.trace(0)
        assert session.state.remasking.ring is None  # no re-mask, so nothing is kept
    assert torch.equal(torch.stack(static.logits), torch.stack(watched.logits))
    assert session.events == []
    assert len(trace["signal"]) == 5
    assert {"mean", "deviation", "threshold"} <= trace.keys()


def test_a_detector_that_only_watches_leaves_steady_re_masks_to_their_time(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.act": False, "remask.every": 4}) as session:
        generate(llama, prompts_of(1, 20), tokens=10)
        assert [a["token"] for a in session.log.alarms] == [3, 6, 9]
        assert [(e["cause"], e["token"]) for e in session.events] == [("steady", 4), ("steady", 8)]


@pytest.mark.parametrize("params", [RESTLESS, {**RESTLESS, "remask.every": 2, "remask.old": "running"},
                                    {**RESTLESS, "remask.dense_tokens": 2}])  # fmt: skip
def test_ratios_stay_as_the_prompt_set_them(llama, params):
    with open_session(llama, "dart", 0.5, **params) as session:
        found = _steps(llama, session, prompts_of(1, 20), random_tokens(12, seed=2))
    counts = [[int(m.sum()) for m in masks] for masks in found]
    assert sum(session.remasks) > 1
    assert all(c == counts[0] for c in counts)
    assert len(set(counts[0])) > 1  # depth-aware: layers differ


def test_a_kept_reference_stays_and_a_moved_one_moves(llama):
    for reference in ("kept", "moved"):
        with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.reference": reference}) as session:
            llama(prompts_of(1, 20), use_cache=True)
            before = session.state.remasking.detector.reference.clone()
            _steps(llama, session, prompts_of(1, 20), random_tokens(7, seed=2))
            assert torch.equal(before, session.state.remasking.detector.reference) == (reference == "kept")


def test_a_further_turn_after_remasks_counts_all_its_tokens(llama):
    """The average is kept on the scale of sums: a turn as long as the first context weighs as much as it."""
    params = {"remask.old": "running", "remask.tokens": 1, "remask.blend": 0.5, "remask.ring": 2}
    state = state_of("dart", llama.float(), **STEADY, **params)
    valid = torch.ones(1, 10, dtype=torch.bool)

    def turn(value):
        for layer, ffn in enumerate(state.ffns):
            state.remasking.ring.write(layer, torch.randn(1, 10, 32), valid)
            state.observe(layer, torch.full((1, 10, ffn.size), value), valid)
        state.finish_context(valid)

    turn(1.0)
    state.remask(Due(torch.tensor([True]), "steady"))
    mean = state.layers[0].sums["score"] / state.weight
    turn(3.0)
    assert torch.allclose(state.layers[0].sums["score"] / state.weight, (mean + 9.0) / 2)


@pytest.mark.parametrize("method", ["dart", "dart-code", "dart-choice", "griffin"])
def test_state_does_not_grow_with_the_prompt(method):
    model = tiny("llama", torch.float32)
    sizes = []
    for length in (80, 240):
        with open_session(model, method, 0.5, **({"remask.window": 1} if method != "griffin" else {})) as session:
            model(prompts_of(1, length), use_cache=True)
            sizes.append(session.state_bytes)
    assert sizes[0] == sizes[1]


def test_what_an_alarm_will_need_is_counted_before_it_comes(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.dense_tokens": 2}) as session:
        llama(prompts_of(1, 20), use_cache=True)
        before = session.state_bytes
        _steps(llama, session, prompts_of(1, 20), random_tokens(4, seed=2))
        assert session.state_bytes == before
    weighing = open_session(llama, "dart", 0.5, **{"score.down_norm": True})
    with weighing as weighed, open_session(tiny("llama"), "dart", 0.5) as plain:
        assert weighed.state_bytes - plain.state_bytes == 3 * 40 * 4


@pytest.mark.parametrize("choice", ["none", "gate-up"])
def test_padding_in_the_ring_may_hold_anything(llama, choice):
    """A padded slot of NaN, as an overflow in half precision would leave, changes nothing."""
    params = {**STEADY, "remask.ring": 4, "choice": choice, "compensation": "mean"}
    masks, made = [], []
    for rubbish in (0.0, float("nan")):
        torch.manual_seed(0)
        state = state_of("dart", llama.float(), **params)
        valid = torch.tensor([[False, True, True]])
        for layer, ffn in enumerate(state.ffns):
            x = torch.randn(1, 3, 32)
            x[:, 0] = rubbish
            state.remasking.ring.write(layer, x, valid)
            a, u = ffn.parts(x)
            state.observe(layer, a * u, valid, u)
        state.finish_context(valid)
        state.remask(Due(torch.tensor([True]), "steady"))
        masks.append(state.masks)
        made.append([layer.constant for layer in state.layers])
    assert _equal(*masks) and _equal(*made)


@pytest.mark.parametrize(("params", "words"), [
    ({"score.vocabulary": "maxx"}, "did you mean max"), ({"remask.old": "none"}, "old is 'none'"),
    ({"choice": "gate-up", "choice.mask_ratio": 0.5}, "mask_ratio is 0.5; it must be at least 1"),
    ({"choice": "gate-up", "choice.mask_ratio": 1e308}, r"mask_ratio is 1e\+308; it must be at most 3"),
    ({"remask.every": 4, "remask.dense_tokens": 3}, "dense_tokens does without it"),
    ({"score.decay": 0}, "decay is 0; it must be more than 0"), ({"remask.every": -1}, "must be at least 0"),
])  # fmt: skip
def test_wrong_parameters_are_refused(llama, params, words):
    with pytest.raises(UserError, match=words), open_session(llama, "dart", 0.5, **params):
        pass


def test_sequences_of_a_batch_are_remasked_on_their_own(llama):
    """One row raises the alarm, the other never: only the first runs dense, and blocks end where it may change."""
    remask = OnDrift(window=2, patience=1, cooldown=9, min_windows=9, floor=0.5, dense_tokens=3, blend=0.0)
    state = state_of("dart", llama.float(), batch=2, remask=remask, allocation="uniform")
    valid = torch.ones(2, 8, dtype=torch.bool)
    direction = torch.zeros(2, 8, 32)
    direction[..., 0] = 1
    for layer, ffn in enumerate(state.ffns):
        state.observe(layer, torch.randn(2, 8, ffn.size), valid)
    state.observe_attention(direction, valid)
    state.finish_context(valid)
    turned = direction[:, :2].clone()
    turned[0, :, 0], turned[0, :, 1] = 0, 1

    def forward(a):
        block = valid[:, : a.shape[1]]
        for layer, ffn in enumerate(state.ffns):
            h = torch.randn(2, a.shape[1], ffn.size)
            kept = state.prune(layer, h, block) != 0
            assert int(kept[1, 0].sum()) == ffn.size // 2
            assert int(kept[0, 0].sum()) == (ffn.size if dense else ffn.size // 2)
        return state.finish_decode(a, block)

    dense = False
    assert state.room() == 2
    assert forward(turned) == []
    assert state.dense_now.tolist() == [True, False]
    dense = True
    assert state.room() == 2  # the window; then what is left of three dense tokens
    assert forward(turned) == []
    assert state.room() == 1
    (change,) = forward(turned[:, :1])
    assert (change.sequence, change.cause) == (0, "alarm")
    dense = False
    forward(turned[:, :1])
    assert state.remasks.tolist() == [1, 0]
