"""Bytes and shares of a model, what methods add and read, and the memory that they take.

FLOPs: tests/derivations/test_flops.py.
"""

import gc

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig

import dart_eval
from dart_eval import prune
from dart_eval.bench import overhead as bench_overhead
from dart_eval.bench import shapes, tracing
from dart_eval.kernels.cpu import build
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning import cost
from dart_eval.pruning.cost import describe, overhead
from dart_eval.pruning.methods.dense import Dense
from dart_eval.pruning.registry import BUILT_IN, make, parse
from dart_eval.util import bits
from dart_eval.util.errors import UserError
from tests.derivations.test_static import OneText
from tests.helpers.models import SMALL, made, random_tokens, tiny, word_tokenizer
from tests.helpers.sessions import generate, open_session, prompts_of
from tests.matrix.types import tiny as typed


def test_attention_whose_output_projection_stands_behind_a_gate():
    """Inkling 2, by hand: 4 heads, each with 8 values of keys and of values."""
    model = typed("inkling2_text")
    assert shape_of(model, find_ffns(model)).attention_widths == (4 * (8 + 8),) * 2


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
    for none in (make("griffin"), make("dart", {"remask.act": False})):
        assert describe(none, shape, 100, 0.5, 0.01)["remask_reads"] == 0


@pytest.mark.parametrize(("spelled", "method", "sparsity"), [
    ("4", "griffin", 0.5), ("2", "cats", 0.55), ("q4_k", "teal", 0.9), ("2", "wina", 0.9),
])  # fmt: skip
def test_scales_that_every_token_reads_are_no_products(spelled, method, sparsity):
    model = tiny("llama")
    with dart_eval.rounded_ffns(model, spelled), open_session(model, method, sparsity, execution="masked") as run:
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


# -- what is charged is what is read: without a context, after a release, on published shapes -------------------------


def test_a_pruned_token_reads_no_more_after_its_masks_are_released():
    prompt = " ".join(f"w{4 + i}" for i in range(30))
    model = tiny("llama", torch.float32)
    found = tracing.trace(
        model, word_tokenizer(), make("dart", {"remask": "never", "remask.release": 4}), 0.7, prompt, None, tokens=12
    )
    assert found["weights_read"] == pytest.approx(0.3)
    assert found["effective_sparsity"] == pytest.approx(4 * (1 - found["weights_read"]) / 12)


@pytest.mark.slow
def test_every_method_is_counted_on_a_shape(monkeypatch):
    monkeypatch.setitem(
        shapes.SHAPES, "small", lambda: LlamaConfig(**{**SMALL, "hidden_size": 256, "intermediate_size": 512})
    )
    for spec in (*(name for name in BUILT_IN if name != "dense"), "rounding:entries.bits=4"):
        found = bench_overhead.measure(make(*parse(spec)), "small", 0.6, (16, 40), 40)
        assert all(n >= 0 for n in found.parts.values()) and found.state_bytes[40] == sum(found.parts.values()), spec


def test_shapes_have_the_sizes_of_their_models():
    sizes = {"llama-3.1-8b": 8.03, "llama-3.2-3b": 3.213, "llama-3.2-1b": 1.236, "qwen2.5-1.5b": 1.544}
    for name, billions in sizes.items():
        model = shapes.without_weights(name)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert len(shapes.without_weights("llama-3.1-8b", 2).model.layers) == 2
    with pytest.raises(UserError, match="did you mean llama"):
        shapes.config("llama-3.1-8B")


# -- bytes that lie beside the dense model while one sequence decodes, counted without decoding -----------------------


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


LAYERS = 2


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


@pytest.mark.parametrize("method", ["dart", "flap", "grinqh", "rounding"])
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
    packed = cost.why_not_packed(ffns, bits.parse("8:row")) is None
    codes = sum(f.size * (2 * (8 + 16 / f.width) * f.width + (8 + 16 / f.size) * f.width) for f in ffns)
    assert cost.memory(Dense(), ffns, False, 0, bits.parse("8:row")) == (round(codes / 8) if packed else 8 * weights)
    assert cost.memory(Dense(), ffns, False, 0, bits.parse("3")) == 8 * weights
    assert cost.memory(Dense(), ffns, False, 0) == 0
