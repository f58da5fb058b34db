"""Projections that are no plain matrices, as quantisation libraries and accelerate leave them."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.functional import linear
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from dart_eval.kernels.fast import unlike_plain
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.quantised import nbytes, stated_bits, values
from dart_eval.layers.shape import shape_of
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import about, bits_per_row, rounded_ffns, served_bits, served_share
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import go_on, open_session


def _box(module):
    """torchao's: integers and a scale that pass for a tensor of floats."""
    quantize_(torch.nn.Sequential(module), Int8WeightOnlyConfig())


def _round_inputs(module):
    """Plain weights, and a forward of the instance that rounds its inputs: compressed-tensors' W8A8."""

    def forward(x):
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
        return linear((x / scale).round() * scale, module.weight, module.bias)

    module.forward = forward


def _pack(module):
    """The weight under another name: GPTQ, packed compressed-tensors."""
    # What such packages do: torch has no public way to take a parameter away and keep it.
    module.packed = module._parameters.pop("weight")
    module.forward = lambda x: linear(x, module.packed, module.bias)


def _eighths(module):
    """float8 and a scale beside it: the numbers alone say nothing of a row's norm."""
    module.register_buffer("scale", module.weight.detach().abs().amax(1, keepdim=True) / 448)
    module.weight = torch.nn.Parameter((module.weight.detach() / module.scale).to(torch.float8_e4m3fn), False)
    module.forward = lambda x: linear(x, module.weight.to(x.dtype) * module.scale, module.bias)


def _pack_dynamically(module):
    """torch's own: it packs weights for its kernels, and gives them when it is asked."""
    packed = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), {torch.nn.Linear})[0]
    module.__class__, module.__dict__ = type(packed), packed.__dict__


def _projections(model):
    return [m for f in find_ffns(model) for m in (f.gate, f.up, f.down)]


def _changed(change):
    """A tiny model all of whose FFNs' projections are changed."""
    model = tiny("llama", torch.float32)
    for module in _projections(model):
        change(module)
    return model


def _decoded(model, execution):
    """A decoded token's logits, and how they were made."""
    ids = torch.tensor([random_tokens(20)])
    with open_session(model, "griffin", 0.5, execution=execution) as session:
        out = model(ids, use_cache=True)
        step = go_on(model, out, ids[:, :1])
        return step.logits, session.execution


@pytest.mark.parametrize(("change", "reason"), [
    (_round_inputs, "a forward of its own"), (_box, "Tensor"), (_pack, "a form of their own"),
    (_eighths, "float8_e4m3fn"),
])  # fmt: skip
def test_what_is_no_plain_projection_is_pruned_by_masks_for_the_right_reason(change, reason):
    model = _changed(change)
    with pytest.warns(UserWarning, match=reason) as said:
        found, execution = _decoded(model, "auto")
    assert execution == "masked" and len(said) == 1
    assert torch.equal(found, _decoded(model, "masked")[0])


@pytest.mark.parametrize(("change", "method"), [(_box, "magnitude"), (_pack, "wanda-sp"), (_eighths, "magnitude")])
def test_methods_that_read_weights_read_what_quantised_ones_stand_for(method, change):
    model, plain = _changed(change), tiny("llama", torch.float32)
    for ours, theirs in zip(_projections(plain), _projections(model), strict=True):
        ours.weight = torch.nn.Parameter(values(theirs, theirs.in_features), requires_grad=False)
    ids = torch.tensor([random_tokens(20)])
    found = []
    for one in (model, plain):
        find_ffns(one)
        with warnings.catch_warnings(), open_session(one, method, 0.4, execution="masked") as session:
            warnings.simplefilter("ignore")
            out = one(ids, use_cache=True)
            step = go_on(one, out, ids[:, :1])
            ffns = find_ffns(one)
            # Of the columns of down that are left out: they are read, too.
            scales = 0.4 * bits_per_row(ffns[0])[2] / served_bits(ffns) / 3
            found.append((step.logits, session.weights_read / served_share(ffns) - scales))
    (ours, read), (theirs, theirs_read) = found
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and read == pytest.approx(theirs_read)


def test_what_needs_the_weights_themselves_is_refused():
    for change in (_box, _pack):
        model = _changed(change)
        before = [module._parameters.get("weight") for module in _projections(model)]
        for block in (open_session(model, "rounding", 0.5), rounded_ffns(model, 4)):
            with pytest.raises(UserError, match="unquantised"), block:
                pass
        assert all(a is b._parameters.get("weight") for a, b in zip(before, _projections(model), strict=True))


def test_projections_without_a_weight_count_as_others_do():
    """GPTQ and AWQ hold codes in buffers, those of attention too."""
    model, plain = tiny("llama"), tiny("llama")
    for module in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]:
        weight = module._parameters.pop("weight")
        module.register_buffer("qweight", weight.detach().half())
        module.forward = lambda x, m=module: linear(x, m.qweight.to(x.dtype))
    made, stock = (shape_of(m, find_ffns(m)) for m in (model, plain))
    for part in ("other_weights", "ffn_weights", "ffn_share"):
        assert getattr(made, part) == getattr(stock, part)
    norms_and_ends = sum(p.numel() * 8 for n, p in plain.named_parameters() if "proj" not in n)
    assert nbytes(model) == norms_and_ends + 2 * (stock.other_weights + stock.ffn_weights)


def test_bits_of_weights_that_no_configuration_describes_count_16():
    model = tiny("llama", torch.float32)
    for change, module in zip((_box, _eighths, _pack), _projections(model), strict=False):
        change(module)
    assert served_bits(find_ffns(model)) == 16 and about(find_ffns(model))
    assert not about(find_ffns(tiny("llama")))


def test_weights_that_torch_packs_are_refused():
    with pytest.raises(UserError, match="torchao"):
        find_ffns(_changed(_pack_dynamically))


def test_a_model_that_accelerate_spreads_is_still_reordered():
    """Its hooks replace the forward of every module, and keep the class's own."""
    model = tiny("llama")
    before, _ = _decoded(model, "auto")
    for module in _projections(model):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert unlike_plain(find_ffns(model)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found, execution = _decoded(model, "auto")
    assert execution == "copied"
    assert torch.equal(found, before)
    wrapped = _changed(_round_inputs)
    for module in _projections(wrapped):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert "forward of its own" in unlike_plain(find_ffns(wrapped))


@pytest.mark.parametrize("bias", [None, 0.5])
def test_values_are_exact_beside_a_bias(bias):
    """What a bias is added to is rounded to bfloat16, and the sum less the bias is another number."""
    layer = nn.Sequential(nn.Linear(64, 48, bias=bias is not None)).bfloat16()
    with torch.no_grad():
        layer[0].weight.normal_(0, 0.02)
        if bias is not None:
            layer[0].bias.normal_(0, 1).mul_(bias)
    own = layer[0].bias
    quantize_(layer, Int8WeightOnlyConfig())
    assert torch.equal(weight_matrix(layer[0]).float(), layer[0].weight.dequantize().float())
    assert layer[0].bias is own


STATED = [
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, 3 + 16 / 128),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4), ({"quant_method": "mxfp4"}, 4 + 16 / 64),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4 + 16 / 64),
    ({"quant_method": "quanto", "weights": "int2"}, 2),
    ({"quant_method": "fbgemm_fp8"}, 8),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}}, 4),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "input_activations": {"num_bits": 8}, "weights": {"num_bits": 4, "group_size": 128}}}}, 4 + 16 / 128),
    ({"quant_method": "bitnet"}, 16),
    (None, 16),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "bits"), STATED)
def test_bits_are_read_from_the_settings_of_any_method(settings, bits):
    found = stated_bits(SimpleNamespace(quantization_config=settings))
    assert found.total == bits and found.about
