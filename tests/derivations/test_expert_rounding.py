"""Experts on few bits: each matrix of each expert by itself, in whatever layout a type keeps them."""

import pytest
import torch

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.util.bits import Rounding, parse
from dart_eval.weights.rounding import rounded, served_share
from tests.helpers.matrices import in_turn
from tests.helpers.sessions import bits, generate, open_session, prompts_of, same
from tests.matrix.types import tiny

PLAIN, GATED = "nemotron_h", ("qwen3_moe", "gpt_oss", "deepseek_v3")


def matrices(name, experts):
    """Of each expert gate (of a plain FFN up), up and down as [out, in]: views into the parameters, type by type."""
    for e in range(len(experts.down_proj)):
        if name == "gpt_oss":  # [in, out], gate and up in turn
            yield experts.gate_up_proj[e].T[::2], experts.gate_up_proj[e].T[1::2], experts.down_proj[e].T
        elif name == PLAIN:
            yield experts.up_proj[e], experts.down_proj[e]
        else:
            half = experts.gate_up_proj.shape[1] // 2
            yield experts.gate_up_proj[e, :half], experts.gate_up_proj[e, half:], experts.down_proj[e]


def experts_of(model):
    return [f.routed.experts for f in find_ffns(model) if f.routed]


# Groups that divide a row, and others.
@pytest.mark.parametrize(("name", "text"), in_turn([*GATED, PLAIN], ["4", "3:24", "4:row", "4:5"]))
def test_each_matrix_of_each_expert_is_rounded_by_itself(name, text):
    model = tiny(name)
    own, before = [[m.clone() for m in each] for x in experts_of(model) for each in matrices(name, x)], bits(model)
    with dart_eval.rounded_ffns(model, text):
        now = [[m.clone() for m in each] for x in experts_of(model) for each in matrices(name, x)]
        assert all(p.is_contiguous() for x in experts_of(model) for p in x.parameters())
    assert same(model, before)
    assert len(own) == len(now) and not torch.equal(own[0][0], now[0][0])
    for was, became in zip(own, now, strict=True):
        for a, b in zip(was, became, strict=True):
            assert torch.allclose(b, rounded(a, parse(text)).values, atol=1e-7)


@pytest.mark.parametrize(("name", "inner", "matrices_of"), [("qwen3_moe", 16, 3), ("gpt_oss", 48, 3)])
def test_dense_on_few_bits_is_a_control_for_experts_too(name, inner, matrices_of):
    """A weight has 4 bits and its part of a scale of 16: rows of 32 in gate and up, of `inner` in down."""
    model, prompt = tiny(name), prompts_of(1, 12)
    into, out = Rounding(4).weight_bits(32), Rounding(4).weight_bits(inner)
    wanted = ((matrices_of - 1) * into + out) / matrices_of / 16
    assert out == 4 + 16 * -(-inner // 32) / inner
    with dart_eval.rounded_ffns(model, 4):
        assert served_share(find_ffns(model)) == pytest.approx(wanted)
        dense = generate(model, prompt, 3)
        with open_session(model, "griffin", 0.0) as session:
            assert torch.equal(generate(model, prompt, 3).sequences, dense.sequences)
            assert session.weights_read == pytest.approx(wanted)
        with open_session(model, "griffin", 0.5) as session:
            generate(model, prompt, 3)
            across = (out - 4) / matrices_of / 16  # the scales of down, each of which stands for several neurons
            assert session.weights_read == pytest.approx((wanted + across) / 2)
    assert served_share(find_ffns(model)) == 1
    assert not torch.equal(generate(model, prompt, 3).logits[0], dense.logits[0])
