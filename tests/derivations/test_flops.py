"""FLOPs of a prompt and of a decoded token, as torch counts them while the model runs.

A multiply-add is two. Of N tokens, each multiplies every weight of the layers' projections once; each head compares all
with all, whatever the causal mask, and sums up what it has found; the output head is asked at the last one alone:

    prompt          2 N (weights of FFNs and attention) + 2 N^2 (what heads compare + what they sum up) + 2 head
    decoded token   2 (weights of FFNs and attention) + 2 position (compare + sum up) + 2 head

where position counts the tokens that it attends to, itself included, at most a sliding window. Pruned, a decoded token
multiplies only a share of the FFNs' weights: as many as a model has whose FFNs are that much smaller. torch's counter
leaves out norms, activations and softmax; attention must be `eager` for it to see a decoded token's.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dart_eval.evaluation.batching import CACHED_TOKENS, token_bytes
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.methods.both import GradedBoth
from tests.derivations.plain import cache_name
from tests.helpers.models import CONFIGS, FAMILIES, STREAMS, random_model, random_tokens, tiny

PROJECTED = ["opt with the norm after the FFN", "gemma4", "gemma4 with embeddings of every layer"]
FFN_SIZE = {"gpt2": "n_inner", "opt": "ffn_dim"}  # others: intermediate_size


def counted(model, length):
    """FLOPs of a prompt of that many tokens, and of the token after it."""
    tokens, flops, past = torch.tensor([random_tokens(length)]), [], {}
    name = cache_name(model)
    for ids in (tokens, tokens[:, :1]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = model(ids, use_cache=True, logits_to_keep=1, **past)
        flops.append(counter.get_total_flops())
        past = {name: getattr(out, name)}
    return tuple(flops)


def ours(model, length, read=1.0):
    """The same by the package, from shapes. read: share of the FFN weights that the token multiplies."""
    shape = shape_of(model, find_ffns(model))
    return shape.prefill(length), shape.decode(length + 1, read)


def test_flops_are_those_that_torch_counts():
    for family in FAMILIES:
        model = tiny(family, torch.float32, attention="eager")
        assert ours(model, 12) == counted(model, 12), family


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "opt"))])
def test_pruned_flops_are_those_of_a_model_with_smaller_ffns(family):
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    setattr(config, FFN_SIZE.get(family, "intermediate_size"), 12)  # of 40 neurons: 70 % pruned
    small = AutoModelForCausalLM.from_config(config).eval()
    model = tiny(family, torch.float32, attention="eager")
    assert ours(model, 12, read=0.3)[1] == counted(small, 12)[1]


def test_sliding_layers_look_back_to_their_window_only():
    """Gemma 3 with a window of 16 in two of its three layers, and a prompt of 40."""
    model = tiny("gemma3", torch.float32, attention="eager")
    assert shape_of(model, find_ffns(model)).windows == (16, None, 16)
    assert ours(model, 40) == counted(model, 40)


@pytest.mark.parametrize("family", PROJECTED)
def test_flops_of_families_that_project_beside_their_layers_or_whose_heads_differ(family):
    """OPT-350m projects into and out of its layers; Gemma 4 has larger heads in its full-attention layers."""
    model = random_model(STREAMS[family](), torch.float32)
    assert ours(model, 12) == counted(model, 12)


def test_a_cache_has_keys_and_values_of_every_head_and_layer():
    """A batch is as large as its memory allows: bytes of a token, by hand."""
    model = tiny("llama", torch.float32)
    c = model.config
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 4
    assert token_bytes(model) == cache * (1 + CACHED_TOKENS) + 4 * (4 * c.intermediate_size + 8 * c.hidden_size)


def test_a_second_look_multiplies_rows_once_more():
    """A tenth of gate and up. Beside it 4 levels a column are compared, and errors sum 3 operations for each of x."""
    model = tiny("llama", torch.float32)
    shape, neurons = shape_of(model, find_ffns(model)), 120
    x = 2 * shape.layers * shape.width  # inputs of gate and up
    choice = 2 * 4 * (x + neurons) + 3 * x + 14 * neurons
    method = GradedBoth(entries_neurons=0.1, entries_more=6)
    assert method.step_flops(shape) == pytest.approx(0.1 * 2 * neurons * 2 * shape.width + choice)


def test_latent_attention_compares_more_than_it_sums_up():
    """MiniCPM3, here 12 numbers and 8 of each head. (How often a decoded token expands its cache is not counted.)"""
    model = random_model(STREAMS["minicpm3"](), torch.float32)
    assert ours(model, 12)[0] == counted(model, 12)[0]
