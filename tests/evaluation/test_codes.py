"""Codes of quantised checkpoints: taken as stored, held against the weights, and previewed by their high bits."""

import gc
import weakref

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.choices.images import Columns, FirstBits
from dart_eval.pruning.choices.serving import Serving
from dart_eval.util.bits import Rounding
from dart_eval.weights import codes, gguf_codes, grids
from dart_eval.weights.gguf_codes import GRIDS, UNIT, codes_of
from dart_eval.weights.rounding import coded, served_inputs, served_output
from tests.helpers import stored
from tests.helpers.gguf_files import LAYERS, SIZE, WIDTH, write


def _random(bits, group, seed=0, rows=6, groups=5):
    """Codes, and the weights of a matrix on a grid of its own for each group."""
    source = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    made = torch.randint(-half, half, (rows, groups * group), generator=source)
    scales = torch.rand(rows, groups, generator=source) - 0.3
    offsets = torch.randn(rows, groups, generator=source)
    return made, (scales[..., None] * made.unflatten(1, (groups, group)) + offsets[..., None]).flatten(1)


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group=st.sampled_from([16, 32, 64]), seed=st.integers(0, 999))
def test_scales_and_offsets_are_found_for_codes(bits, group, seed):
    made, values = _random(bits, group, seed)
    for shift in (0, 2 ** (bits - 1)):
        found = codes.fitted(made + shift, values, Rounding(bits, group), unsigned=shift > 0)
        assert torch.equal(found.codes.long(), made)
        assert torch.allclose(found.values, values, atol=1e-4)
    rounded = codes.fitted(made, values.bfloat16(), Rounding(bits, group))
    assert torch.allclose(rounded.values, values, atol=2**-8 * float(values.abs().max()))


@given(bits=st.sampled_from([3, 4, 5]), seed=st.integers(0, 99))
def test_codes_of_other_weights_are_noticed(bits, seed):
    made, values = _random(bits, 32, seed)
    rounding, order = Rounding(bits, 32), torch.randperm(160, generator=torch.Generator().manual_seed(seed))
    assert codes.fitted(made[:, order], values, rounding) is None  # columns in another order
    assert codes.fitted(made.flip(0), values, rounding) is None
    assert codes.fitted(made, values, Rounding(bits, 64)) is None  # each 32 have a scale of their own
    assert codes.fitted(made, values, Rounding(bits - 1, 32)) is None  # they have more bits
    assert codes.fitted(made[:, :-1], values, rounding) is None
    assert codes.fitted(made, torch.randn(values.shape), rounding) is None


def test_equal_weights_and_a_shorter_last_group():
    made, values = _random(4, 32)
    values[0, :32], made[0, :32] = 3.25, 5
    found = codes.fitted(made[:, :-20], values[:, :-20], Rounding(4, 32))
    assert torch.allclose(found.values, values[:, :-20], atol=1e-4)
    assert found.scales[0, 0] == 0 and found.offsets[0, 0] == 3.25


def test_matrices_below_each_other_come_apart_with_their_scales_and_offsets():
    made, values = _random(4, 32)
    parts = codes.fitted(made, values, Rounding(4, 32)).chunk(2)
    assert [len(part.codes) for part in parts] == [3, 3]
    assert torch.allclose(torch.cat([part.values for part in parts]), values, atol=1e-4)


def test_words_are_unpacked_from_their_lowest_bits_up():
    held = torch.arange(16).view(1, 16)
    for order in (None, grids.AWQ):
        words = stored.packed(held, 1, order or range(8))
        assert torch.equal(grids.unpacked(words, 4, order), held.int())
    assert torch.equal(grids.unpacked(torch.tensor([[-1, 0x04030201]], dtype=torch.int32), 8).long(),
                       torch.tensor([[255, 255, 255, 255, 1, 2, 3, 4]]))  # fmt: skip


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("told", [{"bits": 4, "group_size": 32}, {"group_size": 32}])
def test_gptq_and_awq_without_their_library(form, told):
    """What is in a file, by the helper that packs it, and a module that holds the weights."""
    module = nn.Linear(stored.WIDTH, stored.SIZE, bias=False)
    code, scale, zero, values = stored.grid(torch.randn(stored.SIZE, stored.WIDTH))
    parts = {"gptq": stored.gptq_parts, "awq": stored.awq_parts}[form](code, scale, zero)
    module.weight.data = values
    found = grids.FINDERS[form](module, told, parts.get)
    assert torch.equal(found.codes.float(), code - 8)
    assert torch.allclose(found.values, values, atol=1e-3)
    assert grids.FINDERS[form](module, {"bits": 3, "group_size": 32}, parts.get) is None
    module.weight.data = values[:, torch.randperm(stored.WIDTH)]
    assert grids.FINDERS[form](module, told, parts.get) is None  # its columns are in another order


@pytest.mark.parametrize("told", [{}, {"config_groups": None}, {"config_groups": {"W4A16": ["Linear"]}}])
def test_a_configuration_that_says_little_gives_no_codes(told):
    assert grids.FINDERS["compressed-tensors"](nn.Linear(8, 8), told, lambda name: None) is None


def test_weights_that_have_changed_have_other_codes_or_none():
    made, values = _random(4, 32)
    module = nn.Linear(160, 6, bias=False)
    module.weight.data = values.clone()
    codes.note(module, lambda given: codes.fitted(made, given.weight, Rounding(4, 32)))
    assert codes.noted(module) is codes.noted(module) is not None
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.allclose(codes.noted(module).values, 2 * values, atol=1e-4)
    with torch.no_grad():
        module.weight.add_(torch.randn(6, 160))
    assert codes.noted(module) is None


# -- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
def test_codes_of_every_type_give_its_weights(kind):
    """Blocks of random bytes, as the gguf package expands them."""
    raw, values = _blocks(kind)
    bits, group, unsigned = GRIDS[kind]
    found = codes.fitted(torch.tensor(codes_of(raw, kind)), values, Rounding(bits, group), unsigned)
    assert torch.allclose(found.values, values, rtol=1e-5, atol=1e-5)
    assert int(found.codes.min()) == -(2 ** (bits - 1)) and int(found.codes.max()) == 2 ** (bits - 1) - 1


def _blocks(kind):
    """[4, bytes] uint8 of six random blocks a row, with scales of 16 bits that are numbers; and their weights."""
    random, size = np.random.default_rng(0), UNIT[kind][0]
    blocks = random.integers(0, 256, (4, 6, size), dtype=np.uint8)
    floats = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for place in floats.get(kind, [0]):
        scale = random.uniform(0.001, 0.02, (4, 6)).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    raw = blocks.reshape(4, -1)
    return raw, torch.tensor(dequantize(raw, GGMLQuantizationType[kind]))


def test_codes_of_q4_k_are_the_nibbles_of_its_blocks():
    """A block has 16 bytes of scales, then for every 64 weights 32 bytes: low halves first, then high ones."""
    raw, _ = _blocks("Q4_K")
    halves = raw.reshape(4, 6, 144)[..., 16:].reshape(4, 6, 4, 1, 32)
    wanted = np.concatenate([halves & 15, halves >> 4], -2).reshape(4, -1)
    assert np.array_equal(codes_of(raw, "Q4_K"), wanted)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    return resolve(ModelSpec(str(write(tmp_path / "tiny.gguf")), dtype="bfloat16")).load()[0]


def test_an_image_is_the_first_bits_of_the_files_codes(model, tmp_path):
    """Q4_0 by its bytes: a block has a 16-bit scale and 16 bytes, whose low halves are the first 16 codes."""
    raw = {t.name: t.data for t in GGUFReader(tmp_path / "tiny.gguf").tensors}["blk.0.ffn_gate.weight"]
    blocks = np.array(raw).reshape(SIZE, WIDTH // 32, 18)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    code = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(int)
    high = code >> 2
    mean = np.array([(code[high == h] - 8).mean() for h in range(4)])
    wanted = (scale * mean[high]).reshape(SIZE, WIDTH)
    matrix = served_inputs(find_ffns(model)[0])[0]
    assert np.array_equal(matrix.packed.codes.numpy(), (code - 8).reshape(SIZE, WIDTH))
    assert np.allclose(FirstBits().approximate(matrix).numpy(), wanted, atol=2**-7 * np.abs(wanted).max())  # bfloat16


def test_first_bits_are_counted(model):
    """Q4_0: 2 of 4 bits and the scale of 32 (.5 bits); of a chosen row the other 2; Q8_0: 4 of 8 and its scale."""
    ffn, image = find_ffns(model)[0], FirstBits()
    gate, down = served_inputs(ffn)[0], served_output(ffn)
    assert image.bits_of(gate.stored, SIZE, WIDTH) == 2.5 and image.down_bits(down.stored, WIDTH, SIZE) == 4
    assert image.remaining_bits(gate.stored, SIZE, WIDTH, Columns()) == 2
    some = Columns(0.5, 0.25)  # half of the columns in 2 bits, a quarter in one
    assert image.bits_read(gate.stored, SIZE, WIDTH, some) == 1.25 + 0.5
    assert image.remaining_bits(gate.stored, SIZE, WIDTH, some) == 4 - 1.25
    assert (
        image.shared_bits(down.stored, WIDTH, SIZE, graded=True) == 0.5
    )  # scales stand for parts of rows, not of columns


@pytest.mark.parametrize("method", ["dart-plus", "preview"])
def test_a_file_of_few_bits_is_pruned_through_its_own_bits(model, method):
    share = (2 * 4.5 + 8.5) / 3 / 16
    with dart_eval.prune(model, method, 0.3) as session:
        model.generate(torch.tensor([[1, 270, 271, 272]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        taken, written = int(session.state.taken.sum()), int(session.state.written.sum())
    assert 0.97 * 0.7 * share < session.weights_read <= 0.7 * share
    neurons = LAYERS * SIZE
    doubt = 2 * 16 / WIDTH  # of gate and of up, one number a neuron
    if method == "dart-plus":  # the first 2 bits, all scales, the norm of each column of down
        fixed, rows, column, rough = 2 * (2 + 0.5) + doubt + 16 / WIDTH + 0.5, 2 * 2, 8, 4
        bits = fixed * neurons + (rows + column) * taken + rough * (written - taken)
    else:
        bits = (2 * (2 + 0.5) + doubt + 0.5) * neurons + 2 * 2 * taken + 8 * written
    assert session.weights_read == pytest.approx(bits / (16 * 3 * neurons))


def test_codes_are_looked_for_when_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(codes, "fitted", lambda *a: pytest.fail("too early"))
    model = resolve(ModelSpec(str(write(tmp_path / "tiny.gguf")))).load()[0]
    with dart_eval.prune(model, "griffin", 0.5):
        pass


def test_a_model_whose_codes_were_found_is_freed(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    model = resolve(ModelSpec(str(write(tmp_path / "tiny.gguf")))).load()[0]
    down = weakref.ref(model.model.layers[0].mlp.down_proj)
    assert codes.noted(down()) is not None
    del model
    gc.collect()
    assert down() is None


def test_layers_of_16_bits_among_others_are_served_as_whole_numbers_alone(tmp_path, monkeypatch):
    """Codes of the file stay what they are; beside them `dart-plus` rounds what has none."""
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(gguf_codes.GRIDS, "Q8_0", None)
    monkeypatch.delitem(gguf_codes.GRIDS, "Q8_0")
    model = resolve(ModelSpec(str(write(tmp_path / "tiny.gguf")), dtype="bfloat16")).load()[0]
    ffn = find_ffns(model)[0]
    held = coded(ffn.gate)
    assert held is not None and coded(ffn.down) is None
    served = Serving([ffn], Rounding(6, 32), [None])
    served.begin()
    assert coded(ffn.gate) is held and coded(ffn.down).rounding == Rounding(6, 32)
    served.end()
    assert coded(ffn.down) is None
