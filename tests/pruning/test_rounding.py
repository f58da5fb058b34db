"""Rounding of FFN weights: codes, scales, what is counted, and that a model gets its own weights back."""

import itertools
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import dart_eval
from dart_eval.bench import decode
from dart_eval.bench.decode import packed_ffns
from dart_eval.bench.subject import COLUMNS, Subject
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.quantised import RECORDS, Record
from dart_eval.pruning import caches
from dart_eval.pruning.registry import make
from dart_eval.results import speeds
from dart_eval.util.bits import Rounding, Stored, parse
from dart_eval.util.errors import UserError
from dart_eval.weights import decoded
from dart_eval.weights.decoded import Decoded
from dart_eval.weights.rounding import rounded, rounded_ffns, served_bits, served_share
from tests.helpers.commands import command
from tests.helpers.models import SMALL, made, phi3, random_tokens, tiny
from tests.helpers.sessions import bits as state_of
from tests.helpers.sessions import generate, open_session, prompts_of, same
from tests.matrix import types


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


def test_weights_that_are_to_be_rounded_are_not_rounded_again():
    ffns = find_ffns(tiny("llama"))
    make("rounding", {}).check(ffns, 0.75)
    with pytest.raises(UserError, match="16-bit"):
        make("rounding", {}).check(ffns, 0.75, parse("4:32").stored(ffns[0].width))


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


@pytest.mark.slow
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
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, own[name])}
        assert moved == {n for n in own if ".mlp." in n and "bias" not in n}
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


# -- codes and their values: what first bits stand for, values cached while memory is free, codes cached on disk ------


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(1, 8), st.sampled_from([0, 1, 5, 16, 64]), st.integers(1, 70), st.integers(0, 99))
def test_first_bits_stand_for_what_they_leave_open(code_bits, first, group, width, seed):
    """By numpy: of 4 bits a line through the codes, of fewer the mean of those that begin so; all give the code."""
    held = rounded(torch.randn(3, width, generator=torch.Generator().manual_seed(seed)), Rounding(code_bits, group))
    codes, low = held.codes.numpy().astype(int), max(0, code_bits - first)
    scales = held.scales.double().numpy()[:, np.arange(width) // (group or width)]
    begin = codes >> low
    means = np.vectorize({b: np.float32(codes[begin == b].mean()).round() for b in {*begin.flat}}.get)
    if min(first, code_bits) >= 4 and np.ptp(begin):
        means = np.poly1d(np.polyfit(begin.ravel(), codes.ravel(), 1))
    assert held.decoded(torch.float32, first).numpy() == pytest.approx(scales * means(begin), rel=1e-5, abs=1e-6)
    assert held.values.numpy() == pytest.approx(scales * codes, rel=1e-6, abs=1e-9)


def test_room_is_given_back():
    model = tiny("llama")
    before = Decoded.cached_bytes
    with open_session(model, "grinqh", 0.5, "masked"):
        generate(model, prompts_of(1, 9), 3)
    weights = sum(m.weight.nbytes for f in find_ffns(model) for m in f.projections)
    assert Decoded.cached_bytes - before == 4 * weights  # of 2, 4, 6 and 8 bits
    del model
    assert Decoded.cached_bytes == before


@pytest.mark.parametrize(("memory", "cached"), [((10**9, 10**9), True), ((5 * 10**8, 10**9), False), (None, False)])
def test_values_are_cached_while_half_of_the_memory_stays_free(memory, cached, monkeypatch):
    monkeypatch.setattr(decoded, "ROOM", 0)
    monkeypatch.setattr(decoded.machine, "memory", lambda: memory)
    before, values = Decoded.cached_bytes, Decoded(rounded(torch.randn(6, 32), Rounding(8)), torch.float32)
    first = values()
    assert (values() is first) == cached and torch.equal(values(), first)
    assert Decoded.cached_bytes - before == (first.nbytes if cached else 0)
    del values
    assert Decoded.cached_bytes == before


@pytest.mark.slow
def test_codes_of_large_matrices_are_made_once_and_kept_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.pruning.caches.folder", lambda: tmp_path / "calibration")
    made = []
    monkeypatch.setattr(caches, "rounded", lambda *a: made.append(a[0].shape) or rounded(*a))
    tokens = torch.tensor([random_tokens(9)])

    def run(model, method="grinqh"):
        with open_session(model, method, 0.6, "masked"):
            return model(tokens).logits

    first = run(tiny("llama"))
    assert len(made) == 9 and not (tmp_path / "codes").exists()  # no matrix is large
    made.clear()
    monkeypatch.setattr(caches, "LARGE", 100)
    assert torch.equal(run(tiny("llama")), first)
    assert len(made) == 9 and len(list((tmp_path / "codes").iterdir())) == 9
    assert torch.equal(run(tiny("llama")), first) and len(made) == 9  # another model with the same weights
    other = tiny("llama")
    find_ffns(other)[0].up.weight.data += 0.01
    run(other)
    assert len(made) == 10  # only what is another
    run(tiny("llama"), "decdec")
    assert len(made) == 19  # codes of 7 bits
    for path in (tmp_path / "codes").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(run(tiny("llama")), first) and len(made) == 28
    assert caches.folder() == tmp_path / "calibration"


# -- rounded weights in a packed product ------------------------------------------------------------------------------


WIDE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def wide():
    return made(lambda: LlamaConfig(**WIDE), scale=1, dtype=torch.bfloat16)


def test_the_model_says_the_same_through_packed_products_and_is_itself_afterwards():
    model, tokens = wide(), torch.tensor([random_tokens(1)])
    before = model(tokens).logits
    with packed_ffns(model, parse("4:128")):
        inside = model(tokens).logits
    assert torch.equal(model(tokens).logits, before) and not torch.equal(inside, before)
    with rounded_ffns(model, "4:128"):
        torch.testing.assert_close(inside, model(tokens).logits, rtol=0.05, atol=0.1)
    refused = pytest.raises(UserError, match="the kernels read 4, 5, 6 or 8 bits")
    with refused, packed_ffns(tiny("llama"), parse("4:16")):
        pass


@pytest.fixture
def timed(tmp_path, tokenizer):
    """Times methods on a saved model; the command, done."""
    wide().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("bench", "decode", "--model", tmp_path / "model", "--steps", "2", "--rounds", "1", "--prompt", "8")
    return lambda method, *more: command(*words, "--method", method, "--format", "json", *more)


@pytest.mark.slow
def test_rounding_alone_is_timed_and_kept_for_its_own_row(tmp_path, timed):
    out = timed("griffin", "--ffn-bits", "4:128", "--output", tmp_path / "out")
    griffin, dense, _ = json.loads(out.out)
    bits = 4 + 16 * (2 / 64 + 1 / 128) / 3  # a scale for each row
    assert griffin["method"] == "griffin" and dense["bits"] == "4:128"
    assert dense["weights_read"] == pytest.approx(bits / 16)
    assert dense["speedup"] > 0 and dense["ceiling"] > 1 and dense["speedup_n"] == 2
    kept = speeds.load_speeds(tmp_path / "out")
    found = {(s.sparsity, s.ffn_bits): s for s in kept}
    alone, own, on_four = (found[key] for key in ((0.0, "4:128"), (0.7, None), (0.7, "4:128")))
    inputs = {"model": alone.model, "dtype": "bfloat16", "params": alone.params, "sparsity": 0.0}
    pruned = {**inputs, "params": own.params, "sparsity": 0.7}
    assert speeds.of_cell(kept, {**inputs, "ffn_bits": "4:128"}) is alone and speeds.of_cell(kept, inputs) is None
    assert speeds.of_cell(kept, pruned) is own and speeds.of_cell(kept, {**pruned, "ffn_bits": "4:128"}) is on_four


@pytest.mark.slow
def test_what_no_packed_product_takes_is_counted_on_rounded_weights(timed):
    """4.5 and 3.5 bits of 16, and what a method reads of these."""
    done = timed("griffin", "--ffn-bits", "4,3", "--sparsity", "0.5")
    found = {(r["method"], r.get("bits")): r for r in json.loads(done.out)}
    assert list(found) == [("griffin", None), ("dense", "4"), ("griffin", "4"), ("dense", "3"), ("griffin", "3")]
    for (method, few), row in found.items():
        if few:
            # A scale of down stands for 32 neurons: those of all neurons are read.
            own = int(few) + 0.5
            share = (own if method == "dense" else 0.5 * own + 0.5 * 0.5 / 3) / 16
            assert row["why"] and row["speedup"] is None
            assert row["weights_read"] == pytest.approx(share)
            ffn = 1 - 1 / found["dense", "4"]["ceiling"]  # saved at 4.5 of 16 bits
            assert 1 - 1 / row["ceiling"] == pytest.approx(ffn * (1 - row["weights_read"]) / (1 - 4.5 / 16))


@pytest.mark.slow
def test_methods_out_of_reach_on_rounded_weights_alone_are_left_out_there(timed):
    done = timed("decdec,rounding", "--ffn-bits", "2", "--sparsity", "0.6")
    found = [(r["method"], r.get("bits")) for r in json.loads(done.out)]
    assert found == [("decdec", None), ("rounding", None), ("dense", "2")] and done.err.count("is left out") == 2


def test_what_cannot_be_rounded_is_refused_before_anything_is_timed(saved_llama, monkeypatch):
    monkeypatch.setattr(decode, "measure", lambda *given, **more: pytest.fail("timed"))
    words = ("bench", "decode", "--method", "griffin", "--ffn-bits", "4")
    checked = []
    monkeypatch.setattr("dart_eval.bench.subject.refuse_fixed", lambda ffns, _: checked.append(len(ffns)))
    with pytest.raises(pytest.fail.Exception, match="timed"):
        command(*words, "--model", saved_llama)
    assert checked == [3]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_its_own_again_after_methods_on_rounded_weights(monkeypatch, fails):
    model = wide()
    subject, before = Subject(model, None, {"name": "tiny"}, "bfloat16"), state_of(model)
    if fails:
        stock = decode.prune
        monkeypatch.setattr(decode, "prune", lambda *a, **k: 1 / 0 if k["execution"] == "masked" else stock(*a, **k))
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        rows = subject.rows([make("griffin")], 0.25, decode.Setting(8, 2, 1), [parse("3")], print)
        assert [COLUMNS["method"](row) for row, _ in rows] == ["griffin", "dense on 3 bits", "griffin on 3 bits"]
    assert same(model, before) and served_share(find_ffns(model)) == 1


@pytest.mark.parametrize(("family", "spelled"), [("llama", "3"), ("gpt2", "4:row"), ("qwen3_moe", "8:row")])
def test_what_is_read_of_rounded_weights_counts_every_row(family, spelled):
    """Rows of down have another width than those of gate and up: as the same weights count when they are in place."""
    model = types.tiny(family) if family == "qwen3_moe" else tiny(family)
    read = served_bits(find_ffns(model), parse(spelled)) / 16
    with rounded_ffns(model, spelled):
        assert read == pytest.approx(served_share(find_ffns(model)), rel=1e-12)
