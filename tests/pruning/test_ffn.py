"""FFNs: each family's is found and computes what its description says; what is not understood is refused."""

import pytest
import torch

from dart_eval.layers import experts
from dart_eval.layers.activations import Scaled, swish
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.methods.both import expected_square
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns
from tests.helpers.models import FAMILIES, random_tokens
from tests.helpers.models import tiny as tiny_of
from tests.helpers.sessions import bits, open_session, same
from tests.matrix.types import tiny

KINDS = ["phi3", "phi", "gpt_neox", "olmo2", "falcon", "opt"]


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
def test_every_familys_ffn_computes_what_its_description_says(family):
    """What really enters each down projection, from each FFN's own input."""
    model = tiny(family) if family in KINDS else tiny_of(family)
    ffns, hidden, inputs = find_ffns(model), {}, {}
    for f in ffns:
        f.down.register_forward_pre_hook(lambda _m, a, i=f.layer: hidden.__setitem__(i, a[0]))
        f.block.register_forward_pre_hook(lambda _m, a, i=f.layer: inputs.__setitem__(i, a[0]))
    model(torch.arange(4, 12)[None])
    assert [f.layer for f in ffns] == [*range(model.config.num_hidden_layers)]
    for f in ffns:
        found = f.intermediate(inputs[f.layer]).reshape(hidden[f.layer].shape)
        assert torch.allclose(found, hidden[f.layer], atol=1e-6)
        assert hidden[f.layer].shape[-1] == f.size
        assert f.output_weight().shape == (f.width, f.size)
        assert all(w.shape == (f.size, f.width) for w in f.input_weights())
        assert len(f.input_weights()) + 1 == f.matrices


# -- factors, bounds and a constant beside the activation, a norm before down -----------------------------------------


def test_by_hand():
    x = torch.tensor([-3.0, -0.4, 0.2, 3.0])
    assert torch.equal(Scaled(torch.relu, (2.0,), most=1.0)(x), torch.tensor([0.0, 0.0, 0.4, 1.0]))
    lift = Scaled(None, (torch.tensor([1.0, 1.0, 2.0, 1.0]),), -1.0, 1.0, 1.0)
    assert torch.allclose(lift(x), torch.tensor([0.0, 0.6, 1.4, 2.0]))
    assert torch.allclose(swish(1.702)(x), x / (1 + (-1.702 * x).exp()))


@pytest.mark.parametrize("name", ["deepseek_v4", "minimax_m3_vl_text", "dory", "bitnet", "falcon_h1"])
def test_h_is_what_stock_code_feeds_into_down(name):
    model = tiny(name)
    (ffn, *_) = find_ffns(model)
    seen = []
    handle = ffn.into.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = 5 * torch.randn(2, 3, ffn.width)  # far beyond the bounds
    with torch.no_grad():
        ffn.block(x)
        handle.remove()
        assert torch.allclose(ffn.intermediate(x).flatten(0, 1), seen[0].flatten(0, -2), atol=1e-5)
        raw = ffn.act.act if isinstance(ffn.act, Scaled) else ffn.act
        gate, up = (ffn.gate(x), ffn.up(x)) if ffn.gate is not None else ffn.up(x).chunk(2, -1)
    # Without what stands in these entries it would be something else (BitNet's norm alone comes later).
    assert (name == "bitnet") == torch.allclose(raw(gate) * up, ffn.intermediate(x), atol=1e-5)


@pytest.mark.slow
def test_how_often_a_layer_runs_for_a_token_is_seen():
    for name, runs in (("hrm_text", {2, 6}), ("dory", {1, 2}), ("inkling2_loop_text", {1, 3})):
        assert {f.runs for f in find_ffns(tiny(name))} == runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "params", "word"), [
    ("hrm_text", "flap", {}, "several times"), ("hrm_text", "dart", {"allocation": "uniform"}, "several times"),
    ("hrm_text", "dart", {"remask": "never"}, "several times"), ("hrm_text", "teal", {}, "several times"),
    ("bitnet", "flap", {}, "norm"), ("bitnet", "teal", {}, "norm"), ("deepseek_v4", "dart", {}, "allocation=depth"),
])  # fmt: skip
def test_what_does_not_fit_how_a_layer_runs_is_refused(name, method, params, word):
    """A token counted once in layers that run more often; a neuron's own part before a norm; depth of many streams."""
    with pytest.raises(UserError, match=word), open_session(tiny(name), method, 0.5, execution="masked", **params):
        pass


def test_what_a_look_misses_of_up_is_bounded_with_it():
    """By hand: an up of 0.5 or 2.5 that is off by 0.25 either way, doubled and bounded by 2; the gate is known."""
    lift, errors = Scaled(None, (2.0,), -2.0, 2.0), [torch.zeros(1), torch.tensor([0.25])]
    for up, wanted in ((0.5, 9 * (1.5**2 + 0.5**2) / 2), (2.5, 9 * 4)):
        expected = expected_square(torch.relu, [torch.tensor([3.0]), torch.tensor([up])], errors, lift)
        assert expected.item() == pytest.approx(wanted)


# -- Llama 4's experts, which transformers does not hand to a function ------------------------------------------------


LLAMA4 = "llama4_text"


def test_the_model_is_the_same_in_two_steps():
    model = tiny(LLAMA4)
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
    model = tiny(LLAMA4)
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


def test_a_forward_of_somebody_elses_is_put_back():
    model = tiny(LLAMA4)
    block = next(m for m in model.modules() if experts.is_llama4(m))
    theirs = block.__dict__["forward"] = block.forward
    with open_session(model, "griffin", 0.5, execution="masked"):
        assert block.__dict__["forward"] is not theirs
    assert block.__dict__["forward"] is theirs


def test_rounding_reaches_their_weights():
    """Matrices are rounded in the parameter that holds those of all experts, and come back."""
    model = tiny(LLAMA4)
    before = bits(model)
    with rounded_ffns(model, 4):
        moved = {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}
    assert same(model, before) and moved == {n for n in before if "feed_forward" in n and "router" not in n}


# -- refused ---------------------------------------------------------------------------------------------------------


def more_than_described():
    """A gate scaled on the way, as no description says."""
    model = tiny_of("llama")
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + mlp.down_proj(3 * mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return model


def twice(name):
    """Experts that compute something else than described."""
    model = tiny(name)
    block = next(m for m in model.modules() if experts.is_routed(m))
    forward = block.forward

    def more(*args, **kwargs):
        out = forward(*args, **kwargs)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    block.forward = more
    return model


def a_matrix_beside_known_parts():
    model, known = tiny("hy_v4"), tiny("hy_v4")
    known.model.layers[1].attn_hc.add_module("inside", torch.nn.Linear(4, 4))
    assert find_ffns(known)
    layer = model.model.layers[1]
    layer.extra, forward = torch.nn.Linear(32, 32), layer.forward
    layer.forward = lambda x, *a, **k: (lambda out: (out[0] + layer.extra(x), *out[1:]))(forward(x, *a, **k))
    return model


def experts_of_the_layer_itself():
    """Nothing in the block or behind its norm tells: the layer adds another FFN's output."""
    model = tiny_of("llama")
    layer = model.model.layers[1]
    layer.experts = torch.nn.Linear(32, 32).double()
    layer.register_forward_hook(lambda m, _args, out: out + m.experts(out))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("make", "word"), [
    (lambda: tiny("gemma3n_text"), r"act\(gate x\) \* \(up x\)"), (lambda: tiny("dbrx"), "not understood"),
    (lambda: tiny("jetmoe"), "not understood"), (lambda: tiny("longcat_flash"), "not understood"),
    (lambda: tiny("inkling_text"), "more than the FFN"), (more_than_described, "layer 1"),
    (lambda: twice("llama4_text"), "something else"), (lambda: twice("qwen3_moe"), "something else"),
    (a_matrix_beside_known_parts, "extra"), (experts_of_the_layer_itself, "experts"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(make, word):
    with pytest.raises(UserError, match=word):
        find_ffns(make())
