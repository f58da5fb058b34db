"""The kernels that read what a token chooses, in Triton's interpreter: a process of its own, told before the import."""

import importlib.util

import pytest
import torch

from dart_eval.kernels import gather
from tests.helpers.interpreted import interpreted
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import RESTLESS, bits, decoded, open_session, same

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install '.[triton]')"
    ),
]


def kernels():
    """What they read and write is what products with the rows are, in single precision."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for count, width in ((0, 7), (1, 5), (77, 200), (300, 128)):
            weight = torch.randn(300, width, generator=generator).to(dtype)
            rows = torch.randperm(300, generator=generator)[:count]
            x, h = torch.randn(width, generator=generator).to(dtype), torch.randn(count, generator=generator).to(dtype)
            read, written = gather.read_rows(weight, rows, x), gather.write_rows(weight, rows, h)
            assert read.dtype == written.dtype == torch.float32
            assert torch.allclose(read, weight.float()[rows] @ x.float(), atol=1e-4)
            assert torch.allclose(written, h.float() @ weight.float()[rows], atol=1e-4)


def gathering_equals_masks():
    settings = RESTLESS, {**RESTLESS, "choice.write_share": 1.0}, {**RESTLESS, "remask.every": 4}
    for family, params in [*(("llama", p) for p in settings), ("qwen2", settings[1]), ("gemma3", settings[0])]:
        model = biased(family)
        before = bits(model)
        results = []
        for execution in ("masked", "copied"):
            with open_session(model, "dart-choice", 0.5, execution=execution, **params) as session:
                results.append([decoded(model, session, [random_tokens(20, seed)], steps=8) for seed in (3, 4)])
                if execution == "copied":
                    assert session.executing.gathers and session.execution == "copied"
                    assert session.remasks[0] > 1
            assert same(model, before)
        for (ours, *_), (theirs, *_) in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (family, params, (ours - theirs).abs().max())


def a_batch_after_one_sequence():
    """With one mask it is computed on copies of its rows."""
    model = biased("llama")
    before = bits(model)
    with open_session(model, "dart-choice", 0.5, shared_mask=True, **RESTLESS) as session:
        decoded(model, session, [random_tokens(20)], steps=3)
        assert session.executing.gathers
        decoded(model, session, [random_tokens(20), random_tokens(20, 1)], steps=3)
        assert session.execution == "copied" and not session.executing.gathers
    assert same(model, before)


@pytest.mark.parametrize("check", [kernels, gathering_equals_masks, a_batch_after_one_sequence])
def test_in_the_interpreter(check, tmp_path):
    interpreted(check, tmp_path)


def test_a_gpu_without_a_compiler_of_c_gives_a_reason(monkeypatch):
    """Triton builds its driver on first use, and slim images have no compiler: the first token ended in a traceback."""
    monkeypatch.setattr(gather.shutil, "which", lambda _name: None)
    assert gather.missing(torch.device("cuda")) == "Triton needs a C compiler (gcc or clang) on the PATH"
