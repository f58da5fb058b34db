"""FLOPs and bytes from shapes, against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dart_eval.cost import describe, shape_of, tracing
from dart_eval.ffn import cache_argument, find_ffns
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.pruning.methods.magnitude import Magnitude
from dart_eval.pruning.registry import make
from tests.helpers.models import CONFIGS, FAMILIES, STREAMS, random_model, random_tokens, tiny
from tests.helpers.sessions import cache_of


def _counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_torchs_counter(family):
    """Prompts shorter than the sliding window: there every layer attends to everything."""
    model = tiny(family, torch.float32, attention="eager")
    shape = shape_of(model, find_ffns(model))
    ids = torch.tensor([random_tokens(12)])
    prefill, out = _counted(lambda: model(ids, use_cache=True, logits_to_keep=1))
    assert shape.prefill(12) == prefill
    cache = {cache_argument(model): cache_of(out)}
    step, _ = _counted(lambda: model(ids[:, :1], use_cache=True, **cache))
    assert shape.decode(13) == step


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_flops_equal_those_of_a_model_with_smaller_ffns(family):
    model = tiny(family, torch.float32, attention="eager")
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    setattr(
        config, {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size"), 12
    )  # 12 of 40 neurons: 70 % pruned
    small = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([random_tokens(12)])
    _, out = _counted(lambda: small(ids, use_cache=True))
    cache = {cache_argument(small): cache_of(out)}
    step, _ = _counted(lambda: small(ids[:, :1], use_cache=True, **cache))
    assert shape_of(model, find_ffns(model)).decode(13, weights_read=0.3) == step


@pytest.mark.parametrize(
    "family", ["opt with the norm after the FFN", "gemma4", "gemma4 with embeddings of every layer"]
)
def test_flops_of_families_that_project_beside_their_layers_or_whose_heads_differ(family):
    """OPT-350m projects into and out of its layers; Gemma 4 has larger heads in its full-attention layers."""
    model = random_model(STREAMS[family](), torch.float32)
    shape = shape_of(model, find_ffns(model))
    ids = torch.tensor([random_tokens(12)])
    prefill, out = _counted(lambda: model(ids, use_cache=True, logits_to_keep=1))
    assert shape.prefill(12) == prefill
    step, _ = _counted(lambda: model(ids[:, :1], use_cache=True, **{cache_argument(model): cache_of(out)}))
    assert shape.decode(13) == step


def test_latent_attention_compares_more_than_it_sums_up():
    """MiniCPM3, here 12 numbers and 8 of each head. (How often a decoded token expands its cache is not counted.)"""
    model = random_model(STREAMS["minicpm3"](), torch.float32)
    prefill, _ = _counted(lambda: model(torch.tensor([random_tokens(12)]), use_cache=True, logits_to_keep=1))
    assert shape_of(model, find_ffns(model)).prefill(12) == prefill


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


def test_sliding_layers_look_back_to_their_window_only():
    """Gemma 3 with a window of 16 and a prompt of 40, in eager attention."""
    model = tiny("gemma3", torch.float32, attention="eager")
    shape = shape_of(model, find_ffns(model))
    assert shape.windows == (16, None, 16)
    ids = torch.tensor([random_tokens(40)])
    prefill, out = _counted(lambda: model(ids, use_cache=True, logits_to_keep=1))
    assert shape.prefill(40) == prefill
    step, _ = _counted(lambda: model(ids[:, :1], use_cache=True, **{cache_argument(model): cache_of(out)}))
    assert shape.decode(41) == step
