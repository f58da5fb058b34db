"""Triton's kernels for images, in its interpreter: what they multiply, what they read, and what a token then says."""

import importlib.util

import pytest
import torch

from dart_eval.kernels import image_kernels
from dart_eval.pruning.registry import parse
from dart_eval.util.bits import Rounding
from dart_eval.weights.rounding import rounded
from tests.helpers.interpreted import interpreted
from tests.helpers.models import random_tokens
from tests.helpers.sessions import bits, decoded, open_session, same
from tests.pruning.test_previewed import llama

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install '.[triton]')"
)
GENERATOR = torch.Generator().manual_seed(0)


def shown_by_a_copy():
    for rows, width, group in ((40, 64, 32), (5, 7, 0), (33, 200, 64), (17, 130, 5), (1, 2, 2)):
        held = rounded(torch.randn(rows, width, generator=GENERATOR), Rounding(4, group))
        codes = image_kernels.CopyCodes.of(held)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(width, generator=GENERATOR).to(dtype)
            assert torch.allclose(codes.times(x), held.values @ x.float(), rtol=1e-4, atol=1e-4), (rows, width, group)
        assert codes.codes.numel() == rows * -(-width // 2) and codes.scales.dtype == torch.float16


def a_token_says_what_masks_say():
    for dtype, spelled, most in (
        (torch.float32, "preview:image=copy", 1e-4), (torch.float32, "prox", 1e-4),
        (torch.float32, "preview:image=copy:image.group=16", 1e-4),
        (torch.bfloat16, "preview:image=copy", 0.02),  # whose rounding may move which neurons are taken at the cut
    ):  # fmt: skip
        model = llama(dtype, scale=1)
        before, found = bits(model), []
        name, params = parse(spelled)
        for execution in ("masked", "copied"):
            with open_session(model, name, 0.5, execution=execution, **params) as session:
                found.append(decoded(model, session, [random_tokens(20)], steps=3)[0].float())
                assert session.execution == execution
                if execution == "copied":
                    assert all(g.kernels for g in session.copies)
        assert same(model, before)
        apart = (found[0] - found[1]).norm() / found[0].norm()
        assert apart < most, (spelled, apart)


@needs_triton
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("check", [shown_by_a_copy, a_token_says_what_masks_say])
def test_in_the_interpreter(check, tmp_path):
    interpreted(check, tmp_path)
