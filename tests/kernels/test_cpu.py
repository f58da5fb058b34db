"""The kernels for CPUs beside their twins in torch: the product's own formulas, in double precision."""

import itertools
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.ffns import CodedFFN
from dart_eval.kernels.cpu.packing import PAGE, allocate, why_no_kernel
from dart_eval.kernels.mask_rows import RowsProduct
from dart_eval.util.bits import Rounding, parse
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import rounded
from tests.helpers.twins import SHAPES, apart, coded, dense, matrices, size, token, values

pytestmark = pytest.mark.skipif(build.why_no_kernel() is not None, reason=f"{build.why_no_kernel()}")

HALF = 2**-8  # h is rounded to bfloat16 in the product with all neurons, as in the model
CLOSE = 1e-3
# x has 15 bits of the largest of 128 neighbours: where that is 50 times the others, and has no weight, fewer are left.
OUTLIERS = 4e-3
ROUNDINGS = [Rounding(bits, group) for bits, group in itertools.product((4, 5, 6, 8), (128, 0))] + [Rounding(4, 256)]


def test_memory_for_weights_is_whole_and_lies_on_lines():
    for sizes in ((7, 100), (PAGE + 5, 3), (3 * PAGE, 1)):
        parts = allocate(*((size,) for size in sizes))
        for i, part in enumerate(parts):
            part.fill_(i + 1)
        for i, (part, most) in enumerate(zip(parts, sizes, strict=True)):
            assert len(part) == most and part.data_ptr() % 64 == 0 and bool((part == i + 1).all())


def limit(kind):
    return OUTLIERS if kind == "outliers" else CLOSE


@settings(max_examples=30, deadline=None)
@given(
    width=SHAPES["width"], rows=SHAPES["neurons"], seed=SHAPES["seed"], kind=SHAPES["kind"], biased=st.booleans(),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_rows_are_multiplied_as_by_torch(level, width, rows, seed, kind, biased, threads):
    weight, x = matrices(width, rows, seed, kind)[0], token(width, seed, kind).bfloat16()
    bias = torch.randn(rows).bfloat16() if biased else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = RowsProduct(weight, bias, level)(x[None])
    finally:
        torch.set_num_threads(before)
    expected = linear(x.double(), weight.double(), bias if bias is None else bias.double())
    assert apart(found[0], expected, (weight.double() * x.double()).norm()) < HALF


def test_a_row_times_what_is_no_number_is_none(level):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = token(150).bfloat16()
        x[0, 77] = bad
        assert not RowsProduct(matrices(150, 90)[0], None, level)(x).isfinite().any()


@settings(max_examples=40, deadline=None)
@given(**SHAPES, rounding=st.sampled_from(ROUNDINGS))
def test_codes_give_what_their_values_give(level, width, neurons, seed, kind, act, rounding):
    packed, x = coded(*matrices(width, neurons, seed, kind), rounding), token(width, seed, kind)
    expected, beside = dense(x, *values(packed), act), size(x, *values(packed))
    assert apart(CodedFFN(*packed, act, level)(x), expected, beside) < limit(kind)


def test_every_bit_of_every_code_counts(level):
    """Single weights at all places of a row and a column, with all codes there are."""
    for rounding, (width, neurons) in itertools.product(ROUNDINGS, ((130, 18), (256, 300))):
        half = 2 ** (rounding.bits - 1)
        codes = (torch.arange(neurons * width) * 7 % (2 * half) - half).to(torch.int8)
        scale = torch.full((neurons, -(-width // (rounding.group or width))), 0.25).half()
        across = torch.full((width, -(-neurons // (rounding.group or neurons))), 0.25).half()
        matrix = codes.view(neurons, width)
        packed = (
            Packed(matrix, scale, rounding), Packed(matrix.flip(1).contiguous(), scale, rounding),
            Packed(matrix.flip(0).t().contiguous(), across, rounding),
        )  # fmt: skip
        ffn = CodedFFN(*packed, "relu", level)
        for place in (0, 1, 31, 32, 63, 64, 65, 100, 127, 128, width - 1):
            x = torch.zeros(1, width)
            x[0, place] = 1.0
            expected = dense(x, *values(packed), "relu")
            assert apart(ffn(x), expected) < CLOSE, place


def test_bytes_are_those_of_the_format(level):
    packed = coded(*matrices(2048, 256), Rounding(8, 128))
    weights = 3 * 256 * 2048
    scales = 2 * (2 * 256 * 16 + 2048 * 2)
    assert CodedFFN(*packed, level=level).bytes_read == weights + scales


# -- odd input -------------------------------------------------------------------------------------------------------


def coded_ffn(level):
    return CodedFFN(*coded(*matrices(150, 90), Rounding(8, 128)), level=level)


def product_of(level):
    weight = torch.randn(90, 150, generator=torch.Generator().manual_seed(3)).bfloat16()
    product = RowsProduct(weight, None, level)
    return lambda x: product(x.bfloat16())


def test_a_layer_without_neurons_writes_zeros_for_every_token(level):
    """No element in several tokens is not one token: the others' outputs were what lay in memory."""
    product = RowsProduct(torch.empty(90, 0, dtype=torch.bfloat16), None, level)
    for _ in range(3):
        torch.full((2, 1, 90), torch.nan, dtype=torch.bfloat16)  # what may lie there
        assert torch.equal(product(torch.empty(2, 1, 0, dtype=torch.bfloat16)), torch.zeros(2, 1, 90).bfloat16())


def test_what_is_no_number_stays_none(level):
    ffn = coded_ffn(level)
    for bad, place in itertools.product((torch.nan, torch.inf, -torch.inf), (0, 77, 149)):
        x = token(150)
        x[0, place] = bad
        assert ffn(x).isnan().all() and ffn(token(150)).isfinite().all()


def test_tiny_and_huge_numbers_end_and_stay_inside(level):
    for factor in (1e-38, 1e-20, 1e19, 1e38):
        out = coded_ffn(level)(token(150) * factor)
        assert out.shape == (1, 150) and (factor > 1 or out.abs().max() <= 1e-18)


def test_any_floating_dtype_comes_back(level):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ffn, x = coded_ffn(level), token(150).to(dtype)
        out = ffn(x)
        assert out.dtype == dtype and apart(out.float(), ffn(x.float()).double()) < 2**-8


def test_threads_share_the_work_and_change_last_digits_at_most(level):
    before, x, ffn = torch.get_num_threads(), token(150), coded_ffn(level)
    try:
        torch.set_num_threads(1)
        one = ffn(x)
        for threads in (2, 3, 7, 2):
            torch.set_num_threads(threads)
            many = ffn(x)
            assert apart(many, one.double()) < 1e-4 and torch.equal(many, ffn(x))
    finally:
        torch.set_num_threads(before)


def test_calls_at_the_same_time_have_their_own_answers(level):
    tokens = [token(150, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for ffn in (coded_ffn(level), product_of(level)):
            expected = [ffn(x) for x in tokens]
            for _ in range(5):
                assert all(map(torch.equal, pool.map(ffn, tokens), expected))


def in_child(ffn, x, queue):
    queue.put(ffn(x).tolist())


@pytest.mark.process
def test_a_forked_child_has_threads_of_its_own(level):
    before, x = torch.get_num_threads(), token(150)
    context = multiprocessing.get_context("fork")
    try:
        torch.set_num_threads(2)
        ffn, queue = coded_ffn(level), context.SimpleQueue()
        here, child = ffn(x), context.Process(target=in_child, args=(ffn, x, queue))
        child.start()
        child.join(60)
        child.kill()  # one that waits for threads it has not got
        assert child.exitcode == 0 and queue.get() == here.tolist() == ffn(x).tolist()
    finally:
        torch.set_num_threads(before)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_other_tokens_are_refused(level):
    for x in (torch.zeros(2, 150), torch.zeros(1, 149), torch.zeros(150)):
        with pytest.raises(ValueError, match="one token"):
            coded_ffn(level)(x)


def test_other_codes_are_refused_with_the_reason():
    for rounding in map(parse, ("3", "7:128", "8:32", "4:64", "q4_k")):
        assert f"not {rounding.bits} bits in groups of {rounding.group}" in why_no_kernel(rounding, 256)
        with pytest.raises(ValueError, match="the kernels read"):
            CodedFFN(*coded(*matrices(256, 256), rounding))
    assert why_no_kernel(Rounding(8, 256), 512) is None and why_no_kernel(Rounding(4, 512), 256) is None


def test_offsets_and_other_scales_are_refused():
    held = rounded(matrices(64, 40)[0], Rounding(4, 0))
    down = rounded(matrices(64, 40)[2], Rounding(4, 0))
    for odd in (
        Packed(held.codes, held.scales, held.rounding, offsets=torch.zeros(40, 1)),
        Packed(held.codes, held.scales.float() * 1.0001, held.rounding),
    ):
        with pytest.raises(ValueError, match="codes with offsets"):
            CodedFFN(odd, held, down)
