"""Bytes and shares of a model, and what methods add.

FLOPs: tests/derivations/test_flops.py.
"""

import pytest

from dart_eval.cost import describe, shape_of, tracing
from dart_eval.ffn import find_ffns
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.pruning.methods.magnitude import Magnitude
from dart_eval.pruning.registry import make


def test_weights_and_shares(model):
    shape = shape_of(model, find_ffns(model))
    assert shape.weight_bytes == sum(p.numel() for p in model.parameters()) * 8
    assert shape.ffn_weights == sum(
        w.numel() for f in find_ffns(model) for w in [*f.input_weights(), f.output_weight()]
    )
    assert 0 < shape.ffn_share < 1


def test_tracing_grows_with_what_a_method_does(llama):
    shape = shape_of(llama, find_ffns(llama))
    static, griffin, full = (tracing(m, shape, 100, 0.5) for m in (Magnitude(), Griffin(), Dart()))
    assert (static.prefill, static.decode_step, static.remask) == (0, 0, 0)
    assert 0 < griffin.prefill < full.prefill
    assert griffin.decode_step == 0 < full.decode_step
    # the re-mask runs gate and up densely on the ring's 24 inputs: at least that
    assert full.remask > 24 * 2 * 2 * 32 * 3 * 40
    assert tracing(Dart(detect=False), shape, 100, 0.5).remask == 0
    assert tracing(make("dart-code", {"renew": False}), shape, 100, 0.5).remask == 0
    # the mean of pruned neurons: a factor and a sum per neuron and token, and down's columns of the pruned half once
    more = tracing(Dart(compensate=True), shape, 100, 0.5)
    assert more.prefill - full.prefill == 100 * 2 * 3 * 40 + 2 * 32 * 3 * 20
    # tokens that pick: three operations per neuron of a mask of 0.8, and three more per neuron of the prompt
    picky = tracing(Dart(stages=1.6), shape, 100, 0.5)
    assert picky.decode_step - full.decode_step == pytest.approx(3 * 0.8 * 3 * 40)
    assert picky.prefill - full.prefill == 100 * 3 * 3 * 40


def test_what_renewals_read_is_counted(llama):
    """Per decoded token: gate and up of every neuron from the ring, down as well where the pruned are made up for."""
    shape = shape_of(llama, find_ffns(llama))
    found = {name: describe(make(name), shape, 100, 0.5, 0.01)["renewals_read"] for name in ("dart", "dart-plus")}
    assert found == {"dart": pytest.approx(0.01 * 2 / 3), "dart-plus": pytest.approx(0.01 * (2 + 0.2) / 3)}
    # 30 tokens run dense: each reads and multiplies the half that a pruned one leaves out
    code, scoring = describe(make("dart-code"), shape, 100, 0.5, 0.01), 30 * 5 * 3 * 40 + 3 * 3 * 40
    assert code["renewals_read"] == pytest.approx(0.01 * 30 * 0.5)
    assert code["remask"] == scoring + 30 * (shape.decode(101) - shape.decode(101, 0.5))
    assert describe(make("griffin"), shape, 100, 0.5, 0.0)["renewals_read"] == 0
