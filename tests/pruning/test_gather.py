"""The kernels that read what a token picks, in Triton's interpreter: a process of its own, told before the import."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install '.[triton]')"
)

PROGRAM = """
import json, sys, torch
from dart_eval.pruning import gather
from dart_eval.pruning.permuted import PermutedFFNs
from dart_eval.ffn import find_ffns
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of, open_session
from tests.helpers.models import biased
from tests.helpers.sessions import Interrupt, bits, decoded, same


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

for family in ("llama", "qwen2", "gemma3"):
    for params in (RESTLESS, {**RESTLESS, "down": 1.0}, {**RESTLESS, "every": 4}):
        model = biased(family)
        before = bits(model)
        results = []
        for execution in ("masked", "permuted"):
            with open_session(model, "dart-plus", 0.5, execution=execution, **params) as session:
                results.append([decoded(model, session, [random_tokens(20, seed)], steps=12) for seed in (3, 4)])
                if execution == "permuted":
                    assert session.permuted.gathered and session.execution == "permuted"
                    assert session.remasks[0] > 1
            assert same(model, before)
        for (ours, *_), (theirs, *_) in zip(*results):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (family, params, (ours - theirs).abs().max())

# A batch with one mask, after one sequence: slices, and down as it was.
model = biased("llama")
before = bits(model)
with open_session(model, "dart-plus", 0.5, shared_mask=True, **RESTLESS) as session:
    decoded(model, session, [random_tokens(20)], steps=3)
    assert session.permuted.gathered
    decoded(model, session, [random_tokens(20), random_tokens(20, 1)], steps=3)
    assert session.execution == "permuted" and not session.permuted.gathered
assert same(model, before)

# Ctrl-C at every operation of turning, moving and putting back.
ffns, at, interrupted = find_ffns(model)[:1], 0, True
mask = torch.rand(40, generator=generator) < 0.4
while interrupted:
    at += 1
    permuted = PermutedFFNs(ffns, model, gather=True)
    try:
        with Interrupt(at, bool(at % 2)):
            permuted.begin()
            permuted.select(0, mask)
            permuted.restore()
        interrupted = False
    except KeyboardInterrupt:
        pass
    permuted.restore()
    assert same(model, before), at
print(json.dumps({"interrupts": at}))
"""


def test_gathering_equals_masks():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["interrupts"] > 20
