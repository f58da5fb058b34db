"""Triton's kernels for images, in its interpreter: what they multiply, what they read, and what a token then says."""

import importlib.util

import pytest
import torch

from dart_eval.bits import Rounding
from dart_eval.ffn import find_ffns
from dart_eval.pruning import image_kernels
from dart_eval.pruning.kernels import gatherer, lacking
from dart_eval.pruning.parts.images import Plane
from dart_eval.pruning.planes import escapes, exponents
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.slices import Down
from dart_eval.rounding import Served, rounded
from tests.helpers.interpreted import interpreted
from tests.helpers.models import random_tokens
from tests.helpers.sessions import bits, decoded, open_session, same
from tests.pruning.test_previewed import llama

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install '.[triton]')"
)
GENERATOR = torch.Generator().manual_seed(0)


def odd(rows, width):
    """A matrix of bfloat16 with rows far apart, zeros, denormals and a large weight."""
    weight = torch.randn(rows, width, generator=GENERATOR) * torch.logspace(-3, 2, rows)[:, None]
    weight[0] = 0
    weight[1 % rows, ::3] = 1e-40
    weight[-1, -1] = 3e20
    weight[:, 0] *= 2.0**-9
    return weight.to(torch.bfloat16)


def shown_by_a_copy():
    for rows, width, group in ((40, 64, 32), (5, 7, 0), (33, 200, 64), (17, 130, 5), (1, 2, 2)):
        held = rounded(torch.randn(rows, width, generator=GENERATOR), Rounding(4, group))
        codes = image_kernels.CopyCodes.of(held)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(width, generator=GENERATOR).to(dtype)
            assert torch.allclose(codes.show(x), held.values @ x.float(), rtol=1e-4, atol=1e-4), (rows, width, group)
        assert codes.codes.numel() == rows * -(-width // 2) and codes.scales.dtype == torch.float16


def read_from_planes():
    """The image and the exact rows, both against the weights themselves."""
    for rows, width in ((40, 64), (5, 7), (33, 200), (3, 301), (1, 1)):
        weight = odd(rows, width)
        for shown in (0, 1, 3):
            planes = image_kernels.PlaneCodes(weight, shown)
            x = torch.randn(width, generator=GENERATOR)
            image = exponents(weight, 3, shown)
            scale = 1e-5 * weight.float().abs().sum(1) + 1e-30
            assert ((planes.show(x) - image @ x).abs() <= scale).all(), (rows, width, shown)
            for count in (0, 1, rows):
                some = torch.randperm(rows, generator=GENERATOR)[:count]
                ours, theirs = planes.read(some, x), weight.float()[some] @ x
                assert ((ours - theirs).abs() <= scale[some]).all(), (rows, width, shown, count)


def special_weights():
    """Each weight of a row by itself, infinities and NaN among them."""
    weight = torch.tensor([[1.0, -torch.inf, 2**-130, -0.0, 5.5], [torch.nan, 1e-3, -2.0, 0.1, 7.0]]).bfloat16()
    planes = image_kernels.PlaneCodes(weight, 1)
    found = []
    for d in range(5):
        one = torch.zeros(5)
        one[d] = 1
        held = weight.clone().float()
        others = torch.arange(5) != d
        clean = image_kernels.PlaneCodes(torch.where(others & ~weight.isfinite(), 1.0, held).bfloat16(), 1)
        clean.show(one)
        found.append(clean.read(torch.tensor([0, 1]), one))
    assert torch.equal(torch.stack(found, 1).nan_to_num(9.0), weight.float().nan_to_num(9.0))
    planes.show(torch.ones(5))
    assert planes.read(torch.tensor([1]), torch.ones(5)).isnan().all()


def nothing_else_is_read():
    """The preview needs no plane beyond those that it shows, and an exact row nothing of the rest of other rows."""
    weight = odd(40, 64)
    planes, x = image_kernels.PlaneCodes(weight, 1), torch.randn(64, generator=GENERATOR)
    before = planes.show(x)
    some = torch.tensor([3, 17, 39, 4])
    exact = planes.read(some, x)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, some, False)
    planes.mantissa[1:, others] ^= 0x5A
    ends = torch.zeros(41, dtype=torch.long)
    codes = torch.stack([planes.halves & 7, (planes.halves >> 4) & 7], -1).flatten(1)[:, :64]
    ends[1:] = (codes == 7).sum(1).cumsum(0)
    for row in others.nonzero().flatten().tolist():
        planes.exponents[ends[row] : ends[row + 1]] = 99
    assert torch.equal(planes.read(some, x), exact)
    planes.mantissa[1:] ^= 0x33
    planes.exponents[:] = 77
    assert torch.equal(planes.show(x), before)


def a_token_says_what_masks_say():
    """Planes are of bfloat16, whose rounding may move which neurons are taken at the cut."""
    for dtype, spelled, most in (
        (torch.float32, "preview:image=copy", 1e-4), (torch.float32, "prox", 1e-4),
        (torch.float32, "preview:image=copy:image.group=16", 1e-4),
        (torch.bfloat16, "preview", 0.02), (torch.bfloat16, "preview:image.bits=4", 0.02),
    ):  # fmt: skip
        model = llama(dtype, scale=1)
        before, found = bits(model), []
        name, params = parse(spelled)
        for execution in ("masked", "permuted"):
            with open_session(model, name, 0.5, execution=execution, **params) as session:
                found.append(decoded(model, session, [random_tokens(20)], steps=3)[0].float())
                assert session.execution == execution
                if execution == "permuted":
                    assert all(g.kernels for g in session.permuted.gathered)
        assert same(model, before)
        apart = (found[0] - found[1]).norm() / found[0].norm()
        assert apart < most, (spelled, apart)


def what_is_executed_is_what_is_read():
    """By hand for the plane: five bits and a row's exponent of all, six bits and escapes of rows that are taken."""
    model = llama(torch.bfloat16, scale=1)
    method, ffns = make("preview"), find_ffns(model)
    assert lacking(method, ffns, model) is None
    ffn = ffns[0]
    found = gatherer(method, ffns)(ffn, Down(ffn))
    found.prepare(torch.empty(0), 20, 9)
    rest = 6 + escapes(ffn.gate.weight, 3)
    assert abs(found.read[0] - (88 * (5 + 8 / 64) + 20 * rest) / 16) < 1e-6 and found.read[2] == 9


CHECKS = [
    shown_by_a_copy, read_from_planes, special_weights, nothing_else_is_read, a_token_says_what_masks_say,
    what_is_executed_is_what_is_read,
]  # fmt: skip


@needs_triton
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check, tmp_path):
    interpreted(check, tmp_path)


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_planes_take_the_bytes_that_are_counted(shown):
    """Of a width of whole bytes: the plane as its bits say, the rest as is left, and the escapes beside."""
    weight = odd(40, 64)
    planes, image, served = image_kernels.PlaneCodes(weight, shown), Plane(bits=4 + shown), Served(weight)
    first = planes.halves.nbytes + planes.mantissa[:shown].nbytes + planes.largest.nbytes
    assert 8 * first == image.bits_of(served.stored, 40, 64) * weight.numel()
    rest = planes.mantissa[shown:].nbytes + planes.exponents.nbytes
    assert 8 * rest == pytest.approx(image.left(served) * weight.numel())
