"""Rounding of FFN weights: codes, scales, what is counted, and that a model gets its own weights back."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.quantised import RECORDS, Record
from dart_eval.util.bits import Rounding, Stored, parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded, served_bits, served_share
from tests.helpers.models import SMALL, made, phi3, random_tokens, tiny
from tests.helpers.sessions import bits as state_of
from tests.helpers.sessions import generate, open_session, same


def test_bits_are_read_as_typed():
    for text, wanted in (
        ("4", Rounding(4, 32)), ("3:64", Rounding(3, 64)), ("8:row", Rounding(8, 0)), (" 4:32 ", Rounding(4)),
        ("16", None), ("q4_k", Rounding(4, 32, k=True)), ("Q3_K", Rounding(3, 16, k=True)),
    ):  # fmt: skip
        assert parse(text) == wanted
        assert wanted is None or parse(wanted.text) == wanted


def test_other_bits_are_refused():
    for text in (
        "", "x", "1", "9", "4:", "4:1", "4:-2", "16:32", "4.5", "4:32:1", "4:00", "4:999999999999999999999",
        "4:" + "9" * 5000, "9" * 5000, "q_k", "q4", "q2_k",
    ):  # fmt: skip
        with pytest.raises(UserError, match="ffn-bits"):
            parse(text)


def test_bits_of_a_weight_count_its_part_of_a_scale():
    assert Rounding(4).weight_bits(640) == 4.5
    assert Rounding(3).weight_bits(640) / 16 == pytest.approx(0.21875)
    assert Rounding(4, 0).weight_bits(640) == 4 + 16 / 640
    assert Rounding(4, 64).weight_bits(32) == 4.5  # a row is shorter than a group
    assert [parse(f"q{n}_k").weight_bits(512) for n in (3, 4, 5)] == [3.4375, 4.5, 5.5]  # as llama.cpp has them
    assert parse("q4_k").weight_bits(640) == 4 + (20 * 12 + 3 * 32) / 640  # the last block is half full


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 8), st.sampled_from([0, 5, 8, 32]), st.integers(1, 40))
def test_each_weight_has_the_nearest_code(seed, bits, group, width):
    """By numpy, group by group, from the scales that were chosen."""
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    held = rounded(weight, Rounding(bits, group))
    half, size = 2 ** (bits - 1), group or width
    for row in range(3):
        for k, start in enumerate(range(0, width, size)):
            scale = float(held.scales[row, k])
            own = weight[row, start : start + size].numpy()
            codes = held.codes[row, start : start + size].numpy()
            levels = scale * np.arange(-half, half)
            assert codes.min() >= -half and codes.max() < half
            nearest = np.abs(own[:, None] - levels[None]).min(1)
            assert np.abs(own - scale * codes) == pytest.approx(nearest, abs=1e-6)


def test_scales_are_chosen_for_a_small_error():
    """Well below the error of the scale that just reaches the largest weight, and of more bits less."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    before = float("inf")
    for bits in (2, 3, 4, 6, 8):
        error = float((rounded(weight, Rounding(bits)).values - weight).square().mean())
        groups = weight.view(64, -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1 if bits > 1 else 1)
        plain = float(((groups / scale).round() * scale - groups).square().mean())
        assert error < plain * (0.98 if bits < 8 else 1.0) and error < before / 2
        before = error


def test_weights_that_are_all_the_same_stay_near():
    for text in ("4", "q3_k", "q4_k"):
        assert not rounded(torch.zeros(2, 40), parse(text)).values.any()
    for text, width, value in itertools.product(("q4_k", "q5_k"), (1, 31, 40), (1.5414, -0.3, 1e-3)):
        assert rounded(torch.full((2, width), value), parse(text)).values == pytest.approx(value, rel=0.01)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([3, 4, 5]), st.integers(1, 300), st.floats(-1, 1))
def test_k_quants_are_what_their_layout_can_say(seed, bits, width, shift):
    """By numpy: factors of 16 bits a block of 256, whole multiples of them a group, and each weight's nearest code."""
    weight = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) + shift
    held = rounded(weight, parse(f"q{bits}_k"))
    group, least, most = (16, -31, 31) if bits == 3 else (32, 0, 63)
    scales = held.scales.double().numpy()
    minima = [scales] if bits == 3 else [scales, (held.scales * 2 ** (bits - 1) - held.offsets).double().numpy()]
    for values in minima:
        for row, start in itertools.product(range(2), range(0, values.shape[1], 256 // group)):
            block = values[row, start : start + 256 // group]
            factor = float(np.float16(np.abs(block).max() / most))
            if factor:
                whole = block / factor
                assert np.abs(whole - whole.round()).max() < 2e-3
                assert whole.round().min() >= least and whole.round().max() <= most
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    for row, column in itertools.product(range(2), range(width)):
        k = column // group
        could = scales[row, k] * levels + (0 if held.offsets is None else float(held.offsets[row, k]))
        nearest = np.abs(float(weight[row, column]) - could).min()
        assert abs(float(held.values[row, column] - weight[row, column])) == pytest.approx(nearest, abs=1e-5)


def test_k_quants_lose_less_at_the_same_bits():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for bits in (4, 5):
        formats = [parse(text) for text in (f"{bits}", f"q{bits}_k")]
        symmetric, ours = (float((rounded(weight, one).values - weight).square().mean()) for one in formats)
        assert formats[0].weight_bits(512) == formats[1].weight_bits(512)
        assert ours < 0.85 * symmetric


@pytest.mark.parametrize("family", ["phi3", "llama", "gpt2"])
def test_a_model_runs_on_rounded_weights_and_gets_its_own_back(family):
    model = made(phi3, dtype=torch.float32) if family == "phi3" else tiny(family, dtype=torch.float32)
    tokens = torch.tensor([random_tokens(12)])
    own = state_of(model)
    codes = {m: rounded(weight_matrix(m), Rounding(3)) for f in find_ffns(model) for m in f.projections}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = model(tokens).logits
    with dart_eval.rounded_ffns(model, 3):
        ffns = find_ffns(model)
        assert not torch.equal(model(tokens).logits, before)
        # Rows of 32 in gate and up have one scale each, those of 40 in down have two.
        wanted = (2 * 3.5 + 3.8) / 3 if ffns[0].gated else (3.5 + 3.8) / 2
        assert served_bits(ffns) == pytest.approx(wanted) and served_share(ffns) == pytest.approx(wanted / 16)
        for ffn in ffns:
            for module in (m for m in (ffn.gate, ffn.up, ffn.down) if m is not None):
                assert torch.equal(weight_matrix(module), codes[module].values)
    assert same(model, own)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert torch.equal(model(tokens).logits, before) and served_share(find_ffns(model)) == 1


def test_a_model_gets_its_weights_back_after_an_error_and_ffns_alone_are_rounded():
    model = tiny("llama", dtype=torch.float32)
    own = state_of(model)
    with pytest.raises(ZeroDivisionError), dart_eval.rounded_ffns(model, "4:row"):  # noqa: PT012
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, own[name])}
        raise ZeroDivisionError
    assert moved == {name for name in own if ".mlp." in name} and same(model, own)


def test_a_model_under_a_method_is_not_rounded():
    """The method may hold copies of its weights."""
    model = tiny("llama")
    block = dart_eval.rounded_ffns(model, 4)
    with dart_eval.prune(model, "griffin"), pytest.raises(UserError, match="already under"), block:
        pass


def test_a_model_that_moves_while_it_is_rounded_is_whole_afterwards():
    model = tiny("llama", dtype=torch.float32)
    with dart_eval.rounded_ffns(model, 4):
        model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(torch.tensor([[3, 4, 5]]))


def of_neurons(batch, whole=0):
    """Bits of codes and scales by the sequences' counts. whole: matrices of which all rows are read."""
    rows = 4 * WIDTH + 16 * WIDTH / 32  # a row of gate or up: codes, and a scale for each 32 of them
    _, taken, written = batch.counts[0].sum(0).tolist()
    return LAYERS * whole * SIZE * rows + (2 - whole) * taken * rows + written * 4 * WIDTH


LAYERS, WIDTH, SIZE = 3, 64, 96
ACROSS = WIDTH * SIZE / 32 * 16  # the scales of down: 32 neurons of a row share one


@pytest.mark.parametrize(("method", "read", "matrices"), [
    ("griffin", of_neurons, 1), ("cats", lambda rows: of_neurons(rows, whole=1), 1), ("wanda-sp", of_neurons, 1),
    # Half of the inputs of each matrix, whose scales stand for 32 of them.
    ("wina", lambda _rows: LAYERS * 3 * WIDTH * SIZE * 4 / 2, 3),
])  # fmt: skip
def test_every_token_reads_the_scales_that_stand_for_several_neurons(method, read, matrices):
    """A column of down is one neuron's, and each of its scales stands for those of 31 others, too."""
    config = LlamaConfig(**{**SMALL, "hidden_size": WIDTH, "intermediate_size": SIZE, "num_hidden_layers": LAYERS})
    model = made(lambda: config, dtype=torch.float32)
    with dart_eval.rounded_ffns(model, 4), open_session(model, method, 0.5) as session:
        generate(model, torch.tensor([random_tokens(20)]), 4)
        wanted = read(session.rows) + LAYERS * matrices * ACROSS
        assert session.weights_read == pytest.approx(wanted / (16 * 3 * LAYERS * WIDTH * SIZE))
        assert session.effective_sparsity == pytest.approx(
            1 - (session.weights_read * 3 + served_share(find_ffns(model))) / 4  # one token of four is made densely
        )


def test_layers_of_different_bits_are_counted_by_their_own():
    """Each layer keeps its own share: what is read is the sum over layers, not the mean bits by the mean share."""
    model = tiny("llama", dtype=torch.float32)
    each = [4.0 + 1 / 3, 6.0 + 1 / 4, 16.0]
    for ffn, bits in zip(find_ffns(model), each, strict=True):
        for module in ffn.projections:
            RECORDS[module] = Record(Stored.of(bits))
    with open_session(model, "dart", 0.5, execution="masked", remask="never") as session:
        generate(model, torch.tensor([random_tokens(20)]), 3)
        kept = session.rows.counts[0, :, 0].tolist()
        assert len(set(kept)) > 1
        scales = [bits % 1 for bits in each]
        wanted = sum(k * 3 * bits + (40 - k) * scale for k, bits, scale in zip(kept, each, scales, strict=True))
        assert session.weights_read == pytest.approx(wanted / (16 * 3 * 3 * 40))


def test_codes_are_told_from_scales_where_their_sum_alone_is_known():
    for total, code in ((16, 16), (4.5, 4), (5.0, 4), (6.0, 5), (8, 8), (8.03, 8), (6.5625, 6), (2.625, 2)):
        assert Stored.of(total) == Stored(code, total - code)
