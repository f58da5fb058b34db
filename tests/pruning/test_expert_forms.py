"""Experts that transformers does not hand to a function: each form against the module's own answer and by hand."""

import pytest
import torch

from dart_eval.layers import experts
from dart_eval.layers.expert_forms import FORMS, View, form_of
from dart_eval.layers.find import find_ffns
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns
from tests.helpers.models import random_tokens
from tests.helpers.sessions import open_session
from tests.matrix.types import tiny

NAMES = ("llama4_text", "inkling_text", "longcat_flash", "dbrx", "jetmoe")


def modules(model):
    return [m for m in model.modules() if form_of(m) is not None]


def test_each_form_is_some_models():
    assert {form_of(modules(tiny(name))[0]) for name in NAMES} == set(FORMS)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_same_in_two_steps(name):
    model = tiny(name)
    ids = torch.tensor([random_tokens(11), random_tokens(11, 1)])
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        before = [m.__dict__.get("forward") for m in model.modules()]
        with experts.taken_over(model):
            assert torch.allclose(model(input_ids=ids).logits, stock, atol=1e-5)
        assert [m.__dict__.get("forward") for m in model.modules()] == before
        assert torch.equal(model(input_ids=ids).logits, stock)


@pytest.mark.parametrize("name", NAMES)
def test_neurons_are_rows_of_gate_and_up_and_columns_of_down(name):
    """h of a token by the matrices of all experts, which know nothing of forms."""
    model = tiny(name)
    ffn = next(f for f in find_ffns(model) if f.routed and isinstance(f.routed.experts, View))
    seen, wrote = [], []
    handles = [
        ffn.up.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        ffn.down.register_forward_hook(lambda _m, args, out: wrote.append((args[0], out))),
    ]
    with torch.no_grad(), experts.taken_over(model):
        model(input_ids=torch.tensor([random_tokens(7)]))
        for handle in handles:
            handle.remove()
        (x,), ((h, out),) = seen, wrote
        gate, up = ffn.input_weights()
        routed, act = ffn.routed, ffn.routed.experts._get(ffn.routed.experts.form.act)
        gate, up = gate.view(-1, routed.inner, ffn.width), up.view(-1, routed.inner, ffn.width)
        down = ffn.output_weight().T.view(-1, routed.inner, ffn.width)
        for t in range(len(x)):
            total = torch.zeros(ffn.width)
            for place, expert in enumerate(routed.index[t].tolist()):
                inward = 1.0 if routed.inward is None else routed.inward[t, place]
                one = act(gate[expert] @ x[t] * inward) * (up[expert] @ x[t] * inward) * routed.weights[t, place]
                if expert >= 0:
                    assert torch.allclose(h.view(len(x), routed.count, -1)[t, place], one, atol=1e-5)
                    total += one @ down[expert]
            assert torch.allclose(out[t], total, atol=1e-5)


def test_an_expert_that_gives_a_token_back_reads_nothing_and_stays():
    model = tiny("longcat_flash")
    block = modules(model)[0]
    assert len(block.experts.gate_up_proj) > len(block.experts.down_proj)
    idle = block.router.e_score_correction_bias
    idle[len(block.experts.down_proj) :] = 1000.0  # every token has these two, and no other
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        stock = block(x)
        with experts.taken_over(model):
            assert torch.allclose(block(x), stock, atol=1e-6) and (experts.routed(block).index == -1).all()
            _, weights, _ = block.router(x)
    assert torch.allclose(stock, x * weights.sum(-1).view(1, 5, 1), atol=1e-6)


def test_a_token_without_experts_has_a_mask_and_an_h():
    model = tiny("longcat_flash")
    ffn = next(f for f in find_ffns(model) if f.routed)
    routed = ffn.routed
    routed.index = torch.tensor([[-1, 0], [2, -1]])
    routed.weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    h = torch.arange(2 * ffn.size, dtype=torch.float32).view(1, 2, -1) + 1
    h = h * routed.weights.repeat_interleave(routed.inner, 1)
    spread = ffn.spread(h).view(2, -1, routed.inner)
    assert torch.equal(spread[0, 0], h[0, 0, routed.inner :]) and torch.equal(spread[1, 2], h[0, 1, : routed.inner])
    assert int((spread != 0).any(-1).sum()) == 2
    assert ffn.of_token(torch.ones(1, ffn.pool, dtype=torch.bool), 1).all()


@pytest.mark.parametrize("name", ["llama4_text", "qwen3_moe"])
def test_experts_that_compute_something_else_are_refused(name):
    model = tiny(name)
    block = next(m for m in model.modules() if experts.is_routed(m))
    forward = block.forward

    def twice(*args, **kwargs):
        out = forward(*args, **kwargs)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    block.forward = twice
    with pytest.raises(UserError, match="computes something else than the experts that would be pruned"):
        find_ffns(model)


def test_a_forward_of_somebody_elses_is_put_back():
    model = tiny("jetmoe")
    block = modules(model)[0]
    theirs = block.__dict__["forward"] = block.forward
    with open_session(model, "griffin", 0.5, execution="masked"):
        assert block.__dict__["forward"] is not theirs
    assert block.__dict__["forward"] is theirs


@pytest.mark.parametrize("name", NAMES)
def test_rounding_reaches_their_weights_or_is_refused(name):
    """Matrices are rounded where a parameter holds those of all experts, and come back; elsewhere nothing moves."""
    model = tiny(name)
    ffns = [f for f in find_ffns(model) if f.routed]
    before = [[w.clone() for w in (*f.input_weights(), f.output_weight())] for f in ffns]

    def moved():
        return [
            not torch.equal(weight, was)
            for ffn, own in zip(ffns, before, strict=True)
            for weight, was in zip((*ffn.input_weights(), ffn.output_weight()), own, strict=True)
        ]

    if name in ("llama4_text", "jetmoe"):
        with rounded_ffns(model, 4):
            assert all(moved())
    else:
        with pytest.raises(UserError, match="are in no parameter of their own"), rounded_ffns(model, 4):
            pass
    assert not any(moved())
