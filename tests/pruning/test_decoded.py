"""Codes and their values: what first bits stand for, values cached while memory is free, codes cached on disk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.layers.find import find_ffns
from dart_eval.pruning import caches
from dart_eval.util.bits import Rounding
from dart_eval.weights import decoded
from dart_eval.weights.decoded import Decoded
from dart_eval.weights.rounding import rounded
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import generate, open_session, prompts_of


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
