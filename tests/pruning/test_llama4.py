"""Llama 4's experts, which transformers does not hand to a function: against the block's own answer and by hand."""

import pytest
import torch

from dart_eval.layers import experts
from dart_eval.layers.find import find_ffns
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns
from tests.helpers.models import random_tokens
from tests.helpers.sessions import open_session
from tests.matrix.types import tiny

NAME = "llama4_text"


def test_the_model_is_the_same_in_two_steps():
    model = tiny(NAME)
    ids = torch.tensor([random_tokens(11), random_tokens(11, 1)])
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        before = [m.__dict__.get("forward") for m in model.modules()]
        with experts.taken_over(model):
            assert torch.allclose(model(input_ids=ids).logits, stock, atol=1e-5)
        assert [m.__dict__.get("forward") for m in model.modules()] == before
        assert torch.equal(model(input_ids=ids).logits, stock)


def test_neurons_are_rows_of_gate_and_up_and_columns_of_down():
    """h of a token by the matrices of all experts."""
    model = tiny(NAME)
    ffn = next(f for f in find_ffns(model) if f.routed)
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
        routed, act = ffn.routed, next(m for m in model.modules() if experts.is_llama4(m)).experts.act_fn
        gate, up = gate.view(-1, routed.inner, ffn.width), up.view(-1, routed.inner, ffn.width)
        down = ffn.output_weight().T.view(-1, routed.inner, ffn.width)
        for t in range(len(x)):
            total = torch.zeros(ffn.width)
            for place, expert in enumerate(routed.index[t].tolist()):
                inward = routed.inward[t, place]
                one = act(gate[expert] @ x[t] * inward) * (up[expert] @ x[t] * inward) * routed.weights[t, place]
                assert torch.allclose(h.view(len(x), routed.count, -1)[t, place], one, atol=1e-5)
                total += one @ down[expert]
            assert torch.allclose(out[t], total, atol=1e-5)


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
    model = tiny(NAME)
    block = next(m for m in model.modules() if experts.is_llama4(m))
    theirs = block.__dict__["forward"] = block.forward
    with open_session(model, "griffin", 0.5, execution="masked"):
        assert block.__dict__["forward"] is not theirs
    assert block.__dict__["forward"] is theirs


def test_rounding_reaches_their_weights():
    """Matrices are rounded in the parameter that holds those of all experts, and come back."""
    model = tiny(NAME)
    ffns = [f for f in find_ffns(model) if f.routed]
    before = [[w.clone() for w in (*f.input_weights(), f.output_weight())] for f in ffns]

    def moved():
        return [
            not torch.equal(weight, was)
            for ffn, own in zip(ffns, before, strict=True)
            for weight, was in zip((*ffn.input_weights(), ffn.output_weight()), own, strict=True)
        ]

    with rounded_ffns(model, 4):
        assert all(moved())
    assert not any(moved())
