"""Two planes of bfloat16: nothing is lost, and the first plane is the image that it says it is."""

import math

import numpy as np
import pytest
import torch

from dart_eval.bits import Rounding
from dart_eval.pruning.planes import escapes, exponents, high_bits, join, middles, split, truncated
from dart_eval.rounding import rounded


@pytest.mark.parametrize("code_bits", [1, 2, 3, 4, 8])
def test_every_bfloat16_comes_back_to_the_bit(code_bits):
    """All 65,536 patterns: denormals, infinities and NaN with their payloads included."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    mixed = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for rows in (patterns.view(256, 256), mixed.view(64, 1024), mixed.view(-1, 1)):
        again = join(split(rows.contiguous().view(torch.bfloat16), code_bits))
        assert torch.equal(again.view(torch.int16), rows)


def test_escapes_are_counted():
    weight = torch.tensor([[1.0, 0.5, 0.25, 0.0], [8.0, 8.0, 4.0, 2.0]])
    # a code of 1 bit: 0 is the row's largest exponent, 1 all others. Of the first row three, of the second two.
    assert escapes(weight, 1) == 8 * 5 / 8
    assert escapes(weight, 2) == 8 * 1 / 8
    planes = split(weight.to(torch.bfloat16), 2)
    assert planes.escaped.tolist() == [0] and planes.largest.tolist() == [127, 130]


def test_the_image_by_exponents_is_the_mean_of_each_code():
    """By numpy, weight by weight."""
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).float()
    w = weight.numpy()
    exponent = np.floor(np.log2(np.abs(w)))
    largest = exponent.max(1, keepdims=True)
    codes = np.minimum(largest - exponent, 7)
    share = np.abs(w) / 2.0**largest
    means = np.array([share[codes == c].mean() if (codes == c).any() else 0 for c in range(8)])
    expected = np.sign(w) * means[codes.astype(int)] * 2.0**largest
    assert exponents(weight, 3).numpy() == pytest.approx(expected, rel=1e-5)


def test_the_image_by_high_bits_is_the_mean_of_each_of_their_values():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    held = rounded(weight, Rounding(4))
    codes = held.codes.numpy().astype(int)
    high = np.floor_divide(codes + 8, 4)
    means = np.array([codes[high == c].mean() for c in range(4)])
    scales = held.scales.float().numpy().repeat(32, axis=1)
    assert high_bits(held, 2).numpy() == pytest.approx(scales * means[high], rel=1e-5)
    assert torch.equal(high_bits(held, 4), held.values)


def test_a_finer_plane_is_a_better_image():
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(3))
    noise = [float((exponents(weight, bits) - weight).square().mean()) for bits in (1, 2, 3)]
    assert noise[0] > noise[1] > noise[2]
    assert 10 * math.log10(1 / noise[2]) > 14  # dB; 13.4 with a fixed 1.44 instead of means


def test_truncated_weights_keep_their_first_bits():
    weight = torch.tensor([[1.0, 1.25, -1.75, 0.0], [3.0, 1e-40, torch.inf, -torch.inf]])
    assert truncated(weight, 1)[0].tolist() == [1.25, 1.25, -1.75, 0.0]
    assert truncated(weight, 1)[1].tolist() == [3.5, 0.0, math.inf, -math.inf]
    assert truncated(weight, 2)[0].tolist() == [1.125, 1.375, -1.875, 0.0]
    drawn = torch.randn(20, 50, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    assert torch.equal(truncated(drawn, 7), drawn)
    error = ((truncated(drawn.float(), 4) - drawn.float()) / drawn.float()).abs()
    assert 0 < float(error.max()) <= 2**-5


def test_the_control_is_in_the_middle_of_what_a_plane_leaves_open():
    weight = torch.tensor([[8.0, -5.0, 3.5, 0.5, -0.25, 0.0]])  # the last three are escapes of 2 bits, mean .25
    assert middles(weight, 2).tolist() == [[12.0, -6.0, 3.0, 0.25, -0.25, 0.25]]
    assert middles(weight, 2, 1).tolist() == [[10.0, -5.0, 3.5, 0.25, -0.25, 0.25]]


def test_the_first_bits_of_the_mantissa_make_a_finer_image():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).float()
    w = weight.numpy().astype(float)
    exponent = np.floor(np.log2(np.abs(w)))
    largest = exponent.max(1, keepdims=True)
    first = np.floor((np.abs(w) / 2.0**exponent - 1) * 2)
    keys = np.where(largest - exponent >= 7, 14, (largest - exponent) * 2 + first).astype(int)
    share = np.abs(w) / 2.0**largest
    means = np.array([share[keys == c].mean() if (keys == c).any() else 0 for c in range(15)])
    assert exponents(weight, 3, 1).numpy() == pytest.approx(np.sign(w) * means[keys] * 2.0**largest, rel=1e-5)
    noise = [float((exponents(weight, 3, bits) - weight).square().mean()) for bits in range(5)]
    assert noise == sorted(noise, reverse=True) and noise[4] < noise[0] / 50
