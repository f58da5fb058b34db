"""FFNs that do more than multiply: factors, bounds and a constant beside the activation, a norm before down."""

import pytest
import torch
from torch import nn

from dart_eval.layers.activations import Scaled, swish
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.methods.both import expected_square
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens
from tests.helpers.sessions import generate, open_session
from tests.matrix.types import tiny


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


def test_a_mask_comes_before_the_norm():
    model = tiny("bitnet")
    prompt = torch.tensor([random_tokens(12)])
    with open_session(model, "magnitude", 0.5, execution="masked") as session:
        ours = generate(model, prompt, 2).logits[1]
        masks = [mask.clone() for mask in session.masks(0)]
    ffns = find_ffns(model)
    down = [f.norm.register_forward_hook(_times(m)) for f, m in zip(ffns, masks, strict=True)]  # of what it makes
    with torch.no_grad():
        behind = generate(model, prompt, 2).logits[1]
    for handle in down:
        handle.remove()
    assert not torch.allclose(ours, behind, atol=1e-3)


def _times(mask):
    return lambda _m, _args, out: out * mask if out.shape[1] == 1 else out


def test_gates_that_are_compared_with_each_other_are_refused_by_what_they_do():
    with pytest.raises(UserError, match=r"layer 0 of .* does more than act\(gate x\) \* \(up x\)"):
        find_ffns(tiny("gemma3n_text"))


@pytest.mark.parametrize("method", ["flap", "teal"])
def test_what_needs_a_neurons_own_part_does_not_fit_a_norm(method):
    with (
        pytest.raises(UserError, match="norm of its neurons before down"),
        open_session(tiny("bitnet"), method, 0.5, execution="masked"),
    ):
        pass


def test_a_matrix_that_is_not_known_is_refused_beside_parts_that_are():
    model = tiny("hy_v4")
    layer = model.model.layers[1]
    layer.attn_hc.add_module("inside", nn.Linear(4, 4))
    assert find_ffns(model)
    layer.extra = nn.Linear(32, 32)
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: (lambda out: (out[0] + layer.extra(x), *out[1:]))(
        forward(x, *args, **kwargs)
    )
    fresh = tiny("hy_v4")
    fresh.model.layers[1] = layer
    with pytest.raises(UserError, match=r"computes more than the FFN that would be pruned \(extra\)"):
        find_ffns(fresh)


@pytest.mark.parametrize(("name", "runs"), [("hrm_text", {2, 6}), ("dory", {1, 2}), ("inkling2_loop_text", {1, 3})])
def test_how_often_a_layer_runs_for_a_token_is_seen(name, runs):
    assert {f.runs for f in find_ffns(tiny(name))} == runs


@pytest.mark.parametrize(
    ("method", "params"),
    [("flap", {}), ("dart", {"allocation": "uniform"}), ("dart", {"remask": "never"}), ("teal", {})],
)
def test_what_counts_a_token_once_does_not_fit_layers_that_run_more_often(method, params):
    model = tiny("hrm_text")
    with (
        pytest.raises(UserError, match=f"{method} does not fit layers that run several times for a token"),
        open_session(model, method, 0.5, execution="masked", **params),
    ):
        pass


@pytest.mark.parametrize("up", [0.5, 2.5])
def test_what_a_look_misses_of_up_is_bounded_with_it(up):
    """By hand: an up of 0.5 or 2.5 that is off by 0.25 either way, doubled and bounded by 2; the gate is known."""
    lift = Scaled(None, (2.0,), -2.0, 2.0)
    seen, errors = [torch.tensor([3.0]), torch.tensor([up])], [torch.zeros(1), torch.tensor([0.25])]
    expected = expected_square(torch.relu, seen, errors, lift)
    assert expected.item() == pytest.approx(9 * (1.5**2 + 0.5**2) / 2 if up < 1 else 9 * 4)
