"""Codes of quantised checkpoints: found again from what the weights are, and previewed by their high bits."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

import dart_eval
from dart_eval import codes
from dart_eval.bits import Rounding
from dart_eval.ffn import find_ffns
from dart_eval.gguf import GRIDS
from dart_eval.models import ModelSpec, resolve
from dart_eval.pruning.parts.images import Plane
from dart_eval.rounding import Served, coded, served_inputs
from tests.helpers.gguf_files import SIZE, WIDTH, write

NF4 = [-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1]


def _random(bits, group, rows=6, groups=5, seed=0, least=None):
    """Codes, scales and the values of a matrix on a symmetric grid."""
    source = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    made = torch.randint(-half if least is None else least, half, (rows, groups * group), generator=source)
    scales = torch.rand(rows, groups, generator=source) + 0.01
    return made, scales, scales.repeat_interleave(group, 1) * made


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group=st.sampled_from([16, 32, 64]), seed=st.integers(0, 999))
def test_codes_are_found_by_their_scales(bits, group, seed):
    made, scales, values = _random(bits, group, seed=seed)
    found = codes.on_grid(values, scales, Rounding(bits, group))
    assert torch.equal(found.codes.long(), made)
    assert found.offsets is None


@given(bits=st.sampled_from([2, 4]), seed=st.integers(0, 999))
def test_weights_of_16_bits_still_tell_codes_of_4_apart(bits, seed):
    made, scales, values = _random(bits, 32, seed=seed)
    found = codes.on_grid(values.bfloat16(), scales.bfloat16(), Rounding(bits, 32))
    assert torch.equal(found.codes.long(), made)


@given(bits=st.sampled_from([4, 5, 6, 8]), group=st.sampled_from([16, 32]), seed=st.integers(0, 999))
def test_steps_are_found_without_scales(bits, group, seed):
    _, scales, values = _random(bits, group, seed=seed)
    offsets = torch.rand(scales.shape, generator=torch.Generator().manual_seed(seed)) * 15 * scales
    for moved in (values, values + offsets.repeat_interleave(group, 1)):
        found = codes.recovered(moved, Rounding(bits, group))
        assert torch.allclose(found.values, moved, rtol=1e-6, atol=codes.NEAR * float(scales.max()))
        whole = found.scales.abs().repeat_interleave(group, 1) / scales.repeat_interleave(group, 1)
        assert (whole.round() >= 1).all() and torch.allclose(whole, whole.round(), atol=0.01 * 2**bits / 16)


@pytest.mark.parametrize("kind", GRIDS)
def test_every_type_of_file_that_has_a_grid_is_found(kind):
    """Blocks of random bytes, as the gguf package expands them."""
    random, (bits, group) = np.random.default_rng(0), GRIDS[kind]
    layouts = {  # bytes of a block, and where its 16-bit floats lie
        "Q4_0": (18, [0]), "Q5_0": (22, [0]), "Q8_0": (34, [0]), "Q2_K": (84, [80, 82]), "Q3_K": (110, [108]),
        "Q4_K": (144, [0, 2]), "Q5_K": (176, [0, 2]), "Q6_K": (210, [208]),
    }  # fmt: skip
    size, floats = layouts[kind]
    blocks = random.integers(0, 256, (4, 6, size), dtype=np.uint8)
    for place in floats:
        scale = random.uniform(0.001, 0.02, (4, 6)).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    values = torch.tensor(dequantize(blocks.reshape(4, -1), GGMLQuantizationType[kind]))
    found = codes.recovered(values, Rounding(bits, group))
    assert torch.allclose(found.values, values, rtol=1e-5, atol=1e-6)
    assert int(found.codes.min()) >= -(2 ** (bits - 1)) and int(found.codes.max()) < 2 ** (bits - 1)


def test_a_group_of_equal_weights_has_no_step():
    values = torch.full((2, 64), 3.25)
    values[0, :32] = 0
    found = codes.recovered(values, Rounding(4, 32))
    assert torch.equal(found.values, values)


def test_a_last_group_may_be_shorter():
    _, scales, values = _random(4, 32)
    found = codes.recovered(values[:, :-20], Rounding(4, 32))
    assert torch.allclose(found.values, values[:, :-20], atol=1e-5)
    assert codes.on_grid(values[:, :-20], scales, Rounding(4, 32)).codes.shape == (6, 140)


def test_what_lies_on_no_even_grid_has_no_codes():
    source = torch.Generator().manual_seed(0)
    levels = torch.tensor(NF4)[torch.randint(0, 16, (4, 128), generator=source)]
    scales = torch.ones(4, 4)
    for values in (levels, torch.randn(4, 128, generator=source)):
        assert codes.recovered(values, Rounding(4, 32)) is None
        assert codes.on_grid(values, scales / 8, Rounding(4, 32)) is None
    _, scales, values = _random(5, 32)  # more bits than it is said to have
    assert codes.on_grid(values, scales, Rounding(4, 32)) is None
    assert codes.recovered(values, Rounding(4, 32)) is None


def test_distances_that_are_nearly_alike_are_two_steps():
    values = torch.tensor([[0.0, 50.0, 101.0, 101.0]])
    found = codes.recovered(values, Rounding(8, 4))
    assert torch.equal(found.values, values) and float(found.scales) == 1


# -- a file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    return resolve(ModelSpec(str(write(tmp_path / "tiny.gguf")), dtype="bfloat16")).load()[0]


def test_an_image_is_the_high_bits_of_the_files_codes(model, tmp_path):
    """Q4_0 by its bytes: a block has a 16-bit scale and 16 bytes, whose low halves are the first 16 codes."""
    from gguf import GGUFReader

    raw = {t.name: t.data for t in GGUFReader(tmp_path / "tiny.gguf").tensors}["blk.0.ffn_gate.weight"]
    blocks = np.array(raw).reshape(SIZE, WIDTH // 32, 18)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    code = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(int)
    # A scale may be written with the other sign, and then the codes 0 to 15 are 16 - code: the file's own count.
    high = code >> 2
    mean = np.array([(code[high == h] - 8).mean() for h in range(4)])
    wanted = (scale * mean[high]).reshape(SIZE, WIDTH)
    matrix = served_inputs(find_ffns(model)[0])[0]
    found = Plane().values(matrix)
    held = matrix.packed
    assert np.array_equal(
        (held.scales[..., None].sign() * held.codes.view(SIZE, -1, 32)).numpy(), np.sign(scale) * (code - 8)
    )
    assert np.allclose(found.numpy(), wanted, rtol=1e-5)


def test_a_plane_of_codes_is_counted_by_their_bits(model):
    """Q4_0: 2 of 4 bits and the scale of 32 (.5 bits); of a chosen row the other 2; Q8_0: 4 of 8 and its scale."""
    ffn, image = find_ffns(model)[0], Plane()
    gate, down = served_inputs(ffn)[0], Served(ffn.down.weight, 8.5, coded(ffn.down))
    assert image.bits_of(gate.bits, SIZE, WIDTH) == 2.5 and image.left(gate) == 2
    assert image.bits_of(down.bits, WIDTH, SIZE) == 4.5 and image.column(down, 6) == 6.5


@pytest.mark.parametrize("method", ["dart-plus", "preview:image=plane"])
def test_a_file_of_few_bits_is_pruned_through_its_own_bits(model, method):
    share = (2 * 4.5 + 8.5) / 3 / 16
    with dart_eval.prune(model, method, 0.3) as session:
        model.generate(torch.tensor([[1, 270, 271, 272]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert 0.97 * 0.7 * share < session.weights_read <= 0.7 * share


def test_codes_are_looked_for_when_they_are_asked_for(model, monkeypatch):
    monkeypatch.setattr(codes, "recovered", lambda *a: pytest.fail("too early"))
    with dart_eval.prune(model, "griffin", 0.5):
        pass
