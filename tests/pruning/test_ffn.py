"""The adapter table: every family's FFN is found and computes what its description says."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoXConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
)

from dart_eval.layers.find import find_ffns
from dart_eval.util.errors import UserError
from tests.helpers.models import SMALL, tiny
from tests.matrix.types import tiny as tiny_of

BASIC = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
OTHERS = {
    "phi3": lambda: Phi3Config(**SMALL),
    "phi": lambda: PhiConfig(**BASIC),
    "neox": lambda: GPTNeoXConfig(**BASIC),
    "olmo2": lambda: Olmo2Config(**SMALL),
    "falcon": lambda: FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "opt": lambda: OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
}


def _seen_hidden(model, ffns):
    """What really enters each down projection, and each FFN's own input."""
    hidden, inputs = {}, {}
    handles = []
    for f in ffns:
        handles.append(f.down.register_forward_pre_hook(lambda _m, a, i=f.layer: hidden.__setitem__(i, a[0])))
        handles.append(f.block.register_forward_pre_hook(lambda _m, a, i=f.layer: inputs.__setitem__(i, a[0])))
    model(torch.arange(4, 12)[None])
    for h in handles:
        h.remove()
    return hidden, inputs


def _check(model):
    ffns = find_ffns(model)
    assert [f.layer for f in ffns] == [0, 1, 2]
    hidden, inputs = _seen_hidden(model, ffns)
    for f in ffns:
        assert torch.allclose(f.intermediate(inputs[f.layer]).reshape(hidden[f.layer].shape), hidden[f.layer])
        assert hidden[f.layer].shape[-1] == f.size
        assert f.output_weight().shape == (f.width, f.size)
        assert all(w.shape == (f.size, f.width) for w in f.input_weights())
        assert len(f.input_weights()) + 1 == f.matrices


def test_main_families(model):
    _check(model)


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_other_families(family):
    _check(AutoModelForCausalLM.from_config(OTHERS[family]()).eval())


def test_gemma_output_is_taken_after_the_norm_that_follows_the_ffn():
    model = tiny("gemma3")
    ffn = find_ffns(model)[0]
    assert ffn.output is model.model.layers[0].post_feedforward_layernorm
    assert ffn.residual is model.model.layers[0].pre_feedforward_layernorm


@pytest.mark.parametrize(("name", "said"), [
    ("dbrx", "not understood"), ("jetmoe", "not understood"), ("longcat_flash", "not understood"),
    ("inkling_text", "computes more than the FFN"),
])  # fmt: skip
def test_experts_that_are_not_handed_to_a_function_are_refused(name, said):
    with pytest.raises(UserError, match=said):
        find_ffns(tiny_of(name))


def test_an_ffn_that_does_more_than_described_is_refused():
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    inner = mlp.forward

    def forward(x):  # a gate scaled on the way, as no description says
        return inner(x) + mlp.down_proj(3 * mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    mlp.forward = forward
    with pytest.raises(UserError, match="layer 1"):
        find_ffns(model)
