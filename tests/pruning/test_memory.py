"""Memory: bytes that lie beside the dense model while one sequence decodes, counted without decoding."""

import gc

import pytest
import torch
from transformers import Gemma3TextConfig

from dart_eval import prune
from dart_eval.kernels.cpu import build
from dart_eval.layers.find import find_ffns
from dart_eval.pruning import cost
from dart_eval.pruning.methods.dense import Dense
from dart_eval.util.bits import parse
from tests.derivations.test_wanda_sp import OneText
from tests.helpers.models import made, tiny
from tests.helpers.sessions import generate, prompts_of


def alive():
    """Bytes of all tensors of this process by the place of their first element; of views of one memory the largest."""
    gc.collect()
    sizes = {}
    for tensor in (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)):
        sizes[tensor.data_ptr()] = max(sizes.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sizes


def beside(model, method, sparsity):
    """What was counted, and what lies beside the model after a prompt and three decoded tokens of one sequence."""
    find_ffns(model)
    before = alive()
    with prune(model, method, sparsity) as session:
        generate(model, prompts_of(1, 20), 4)
        after = alive()
        return session.memory, sum(size for place, size in after.items() if place not in before)


LAYERS = 3


def demo_sized():
    return Gemma3TextConfig(
        vocab_size=96, hidden_size=640, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ffns"), [("griffin", 0.3), ("dart", 0.31), ("grinqh", 2.03), ("graded-both", 4.51), ("rounding", 1.0)]
)
def test_memory_is_what_lies_beside_a_model(method, ffns):
    """Within .1 %, of which most is what a session notes of its tokens: layers of the demo model's sizes."""
    counted, lies = beside(made(demo_sized, scale=1, dtype=torch.bfloat16), method, 0.7)
    assert counted == pytest.approx(lies, rel=1e-3)
    if build.why_no_kernel() is None:
        assert counted / (LAYERS * 3 * 640 * 2048 * 2) == pytest.approx(ffns, abs=0.01)


@pytest.mark.parametrize("method", ["griffin", "dart", "flap", "cats", "grinqh", "graded-both", "rounding"])
def test_masks_and_batches_count_what_one_sequence_needs_that_runs_on_copies(method):
    model, counted = tiny("llama"), set()
    for execution, rows in (("auto", 1), ("masked", 1), ("masked", 3)):
        with prune(model, method, 0.5, execution=execution, tokenizer=OneText()) as session:
            generate(model, prompts_of(rows, 20), 3)
            counted.add((session.memory, session.state_bytes))
    assert len(counted) == 1


def test_dense_on_rounded_weights_has_a_kernels_codes_or_values():
    ffns = find_ffns(tiny("llama"))
    weights = sum(f.size * f.width * f.matrices for f in ffns)
    packed = cost.why_not_packed(ffns, parse("8:row")) is None
    bits = sum(f.size * (2 * (8 + 16 / f.width) * f.width + (8 + 16 / f.size) * f.width) for f in ffns)
    assert cost.memory(Dense(), ffns, False, 0, parse("8:row")) == (round(bits / 8) if packed else 8 * weights)
    assert cost.memory(Dense(), ffns, False, 0, parse("3")) == 8 * weights
    assert cost.memory(Dense(), ffns, False, 0) == 0
