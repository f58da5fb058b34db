"""Bytes and shares of a model, and what methods add.

FLOPs: tests/derivations/test_flops.py.
"""

import pytest
import torch
from torch import nn

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.cost import describe, overhead
from dart_eval.pruning.registry import make
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import generate, open_session
from tests.matrix.types import tiny as typed


def test_weights_and_shares(model):
    shape = shape_of(model, find_ffns(model))
    assert shape.weight_bytes == sum(p.numel() for p in model.parameters()) * 8
    assert shape.ffn_weights == sum(
        w.numel() for f in find_ffns(model) for w in [*f.input_weights(), f.output_weight()]
    )
    assert 0 < shape.ffn_share < 1


def test_attention_whose_output_projection_stands_behind_a_gate():
    """Inkling 2, by hand: 4 heads, each with 8 values of keys and of values."""
    model = typed("inkling2_text")
    assert shape_of(model, find_ffns(model)).attention_widths == (4 * (8 + 8),) * 4


def test_overhead_grows_with_what_a_method_does(llama):
    shape = shape_of(llama, find_ffns(llama))
    static, griffin, full = (overhead(make(m), shape, 100, 0.5) for m in ("magnitude", "griffin", "dart"))
    assert (static.prefill, static.decode_step, static.remask) == (0, 0, 0)
    assert 0 < griffin.prefill < full.prefill
    assert griffin.decode_step == 0 < full.decode_step
    # the re-mask runs gate and up densely on the ring's 24 inputs: at least that
    assert full.remask > 24 * 2 * 2 * 32 * 3 * 40
    assert overhead(make("dart", {"remask": "never"}), shape, 100, 0.5).remask == 0
    assert overhead(make("dart-code", {"remask.act": False}), shape, 100, 0.5).remask == 0


def test_what_dart_adds_is_what_its_formulas_take(llama):
    """By hand: width 32, three layers of 40 neurons, 100 tokens of context, a re-mask every 100 decoded tokens."""
    shape = shape_of(llama, find_ffns(llama))
    cost = describe(make("dart"), shape, 100, 0.5, 0.01)
    # of each token: a score for each neuron; two norms, a difference and a dot product a layer; a sum for the detector
    assert cost["overhead_prefill"] == 100 * (5 * 120 + 3 * 8 * 32 + 2 * 32)
    # 24 inputs through gate and up, their scores, and the old ones blended in
    assert cost["remask"] == 24 * (2 * 2 * 32 * 120 + 5 * 120) + 3 * 120
    # a sum a token, a cosine for each window of ten
    assert cost["overhead_decode_step"] == pytest.approx(32 + (2 + 6 * 32) / 10 + 0.01 * cost["remask"])
    assert cost["overhead_share"] == pytest.approx(cost["overhead_decode_step"] / shape.decode(101))
    assert (cost["decode_step_dense"], cost["decode_step_pruned"]) == (shape.decode(101), shape.decode(101, 0.5))
    weights = sum(m.weight.numel() for m in llama.modules() if isinstance(m, nn.Linear))
    assert cost["ffn_share"] == pytest.approx(3 * 3 * 32 * 40 / weights)


def test_what_remask_reads_is_counted(llama):
    """Per decoded token: gate and up of every neuron from the ring."""
    shape = shape_of(llama, find_ffns(llama))
    assert describe(make("dart"), shape, 100, 0.5, 0.01)["remask_reads"] == pytest.approx(0.01 * 2 / 3)
    # 30 tokens run dense: each reads and multiplies the part that a pruned one leaves out
    code, scoring = describe(make("dart-code"), shape, 100, 0.3, 0.01), 30 * 5 * 3 * 40 + 3 * 3 * 40
    assert code["remask_reads"] == pytest.approx(0.01 * 30 * 0.7)
    assert code["remask"] == scoring + 30 * (shape.decode(101) - shape.decode(101, 0.3))
    assert describe(make("griffin"), shape, 100, 0.5, 0.0)["remask_reads"] == 0


@pytest.mark.parametrize("bits", ["4", "2", "q4_k"])
@pytest.mark.parametrize(("method", "sparsity"), [("griffin", 0.5), ("cats", 0.55), ("teal", 0.9), ("wina", 0.9)])
def test_scales_that_every_token_reads_are_no_products(bits, method, sparsity):
    model = tiny("llama")
    with dart_eval.rounded_ffns(model, bits), open_session(model, method, sparsity, execution="masked") as run:
        generate(model, torch.tensor([random_tokens(9)]), 2)
        expected = float(run.rows.counts.sum()) / (3 * 120) if method in ("griffin", "cats") else 1 - sparsity
        assert run.method.computed(float(run.step().read[0])) == pytest.approx(expected, abs=0.01)


def test_the_ring_reads_all_experts_that_its_tokens_had():
    """Two of four experts a token: a ring of several inputs has all of them, a ring of one has two."""
    model = typed("qwen3_moe")
    ffns = find_ffns(model)
    shape = shape_of(model, ffns)
    assert overhead(make("dart"), shape, 100, 0.5).remask_read == pytest.approx(2 / 3 * 4 / 2)
    assert overhead(make("dart", {"remask.ring": 1}), shape, 100, 0.5).remask_read == pytest.approx(2 / 3)
