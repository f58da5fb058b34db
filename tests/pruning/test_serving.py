"""Weights of 16 bits served as whole numbers: what forwards multiply, and that the model keeps its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.calibration import stats_cache
from dart_eval.pruning.choices import serving
from dart_eval.pruning.choices.images import LEVELS, level_of
from dart_eval.pruning.registry import make
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded
from tests.helpers.matrices import in_turn
from tests.helpers.models import FAMILIES, random_tokens, tiny
from tests.helpers.sessions import bits, generate, open_session, prompts_of, same


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 8), st.integers(1, 8), st.sampled_from([0, 1, 5, 16, 64]), st.integers(1, 70), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_first_bits_stand_for_what_they_leave_open(code_bits, first, group, width, mixed, seed):
    """By numpy: of 4 bits a line through the codes, of fewer the mean of those that begin so; all give the code itself.

    Columns may be in any order.
    """
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, width, generator=drawn)
    order = torch.randperm(width, generator=drawn) if mixed else torch.arange(width)
    held = rounded(weight, Rounding(code_bits, group), order if mixed else None)
    codes, low = held.codes.numpy().astype(int), max(0, code_bits - first)
    scales = np.empty((3, width))
    for place, column in enumerate(order.tolist()):
        scales[:, column] = held.scales[:, place // (group or width)].double()
    begin = codes >> low
    means = np.vectorize({b: codes[begin == b].mean() for b in {*begin.flat}}.get)
    if min(first, code_bits) >= 4 and np.ptp(begin):
        means = np.poly1d(np.polyfit(begin.ravel(), codes.ravel(), 1))
    wanted = scales * means(begin)
    assert held.decoded(torch.float32, first).numpy() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert held.values.numpy() == pytest.approx(scales * codes, rel=1e-6, abs=1e-9)
    there = weight[:, order]
    assert torch.equal(held.codes[:, order], rounded(there, Rounding(code_bits, group)).codes)


@pytest.mark.parametrize(("family", "room"), in_turn(FAMILIES, [0, 1 << 30]))
def test_prompts_multiply_whole_numbers_and_the_model_keeps_its_weights(family, room, monkeypatch):
    """As `rounded_ffns` has them. After each projection its own weights are back, and after an error, too."""
    monkeypatch.setattr(serving._ROOM, "free_bytes", room)
    monkeypatch.setattr(serving.machine, "memory", lambda: None)
    model, prompts = tiny(family, dtype=torch.float32), prompts_of(2, 9)
    before, dense = bits(model), model(prompts).logits
    with dart_eval.rounded_ffns(model, "8:128"):
        wanted = model(prompts).logits
    with open_session(model, "dart-plus", 0.5):
        assert torch.allclose(model(prompts).logits, wanted, atol=1e-6)
        assert same(model, before)
        assert torch.allclose(model(prompts).logits, wanted, atol=1e-6)  # made anew, or kept
    assert torch.equal(model(prompts).logits, dense)
    ffn = find_ffns(model)[1]

    def stop(*_):
        raise RuntimeError("in the middle of a projection")

    with open_session(model, "dart-plus", 0.5):
        handle = ffn.down.register_forward_pre_hook(stop)  # numbers stand in already
        with pytest.raises(RuntimeError, match="in the middle"):
            model(prompts)
        handle.remove()
    assert same(model, before) and torch.equal(model(prompts).logits, dense)
    with open_session(model, "dart-plus", 0.0):  # nothing is pruned, and nothing is rounded
        assert torch.equal(model(prompts).logits, dense)


def test_room_is_given_back():
    model = tiny("llama")
    before = serving._ROOM.free_bytes
    with open_session(model, "dart-plus", 0.5, "masked"):
        generate(model, prompts_of(1, 9), 3)
    weights = sum(m.weight.nbytes for f in find_ffns(model) for m in f.projections)
    assert before - serving._ROOM.free_bytes == 2 * weights  # what numbers stand for, and their first bits
    del model
    assert serving._ROOM.free_bytes == before


@pytest.mark.parametrize(("found", "cached"), [((10**9, 10**9), True), ((5 * 10**8, 10**9), False), (None, False)])
def test_values_are_cached_while_half_of_the_memory_stays_free(found, cached, monkeypatch):
    monkeypatch.setattr(serving._ROOM, "free_bytes", 0)
    monkeypatch.setattr(serving.machine, "memory", lambda: found)
    values = serving.Decoded(rounded(torch.randn(6, 32), Rounding(8)), torch.float32)
    first = values()
    assert (values() is first) == cached and torch.equal(values(), first)
    assert serving._ROOM.free_bytes == (-first.nbytes if cached else 0)
    del values
    assert serving._ROOM.free_bytes == 0


def test_sparsities_below_what_whole_numbers_read_are_refused_in_one_line():
    model = tiny("llama")
    before = bits(model)
    said = r"choice=graded reads FFN weights in few bits, 0\.5\d+ of their bytes if it reads all, and sparsity 0\.3"
    with pytest.raises(UserError, match=said), open_session(model, "dart-plus", 0.3):
        pass
    assert same(model, before) and not any(f.down in serving.rounding._PACKED for f in find_ffns(model))


def test_what_is_read_settles_what_weights_are_served_as():
    assert [level.least for level in LEVELS] == sorted((level.least for level in LEVELS), reverse=True)
    assert [level_of(1 - s).least for s in (0.64, 0.75, 0.81, 0.87)] == [level.least for level in LEVELS[:-1]]
    for sparsity in (0.5, 0.7, 0.8, 0.843, 0.9):
        level, method = level_of(1 - sparsity), make("dart-plus").at(1 - sparsity)
        assert (method.choice.image.code, method.choice.image.bits) == (level.code, level.bits)
        assert (method.choice.fine, method.choice.rough) == level.columns
        assert method.at(0.99) is method or method.choice == method.at(0.99).choice  # settled once
    assert make("dart-plus").at(0.3, bits=4.5).choice == make("dart-plus").choice  # codes that are there stay
    assert make("dart-plus", {"choice.rough": 0.5}).at(0.16).choice.rough == 0.5
    typed = make("dart-plus", {"image.code": 7, "choice.fine": 0.5}).at(0.1)
    assert (typed.choice.image.code, typed.choice.fine) == (7, 0.5)


def test_prox_by_first_bits_reads_codes_and_not_the_weights():
    """Its image has no code until the read sets one, as of every other choice by first bits."""
    model = tiny("llama")
    with open_session(model, "prox", 0.5, image="first-bits") as session:
        assert session.serving and session.method.choice.image.code == 8
        assert all(f.gate in serving.rounding._PACKED for f in find_ffns(model))


def test_a_plan_prices_weights_as_the_codes_that_a_session_makes():
    model = tiny("llama")
    with open_session(model, "dart-plus", 0.7) as session:
        choice, ffns, unit = session.method.choice, session.ffns, session.prepared.unit
        inside = choice.read_costs(ffns, False, unit)
    assert choice.read_costs(ffns, False, unit) == inside


def test_a_rougher_image_may_have_no_bits():
    """First bits of one bit, and one fewer of other columns."""
    model = tiny("llama")
    with open_session(model, "dart-plus", 0.7, **{"image.bits": 1, "choice.fine": 0.5, "choice.rough": 0.5}):
        assert generate(model, prompts_of(1, 9), tokens=3) is not None


def test_numbers_of_large_matrices_are_made_once_and_kept_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.pruning.calibration.stats_cache.folder", lambda: tmp_path / "calibration")
    made = []
    monkeypatch.setattr(serving, "rounded", lambda *a: made.append(a[0].shape) or rounded(*a))
    tokens = torch.tensor([random_tokens(9)])

    def run(model, **params):
        with open_session(model, "dart-plus", 0.8, **params) as session:
            assert (session.serving.orders[0] is None) != bool(params)
            return model(tokens).logits

    first = run(tiny("llama"))
    assert len(made) == 9 and not (tmp_path / "codes").exists()  # no matrix is large
    made.clear()
    monkeypatch.setattr(serving, "LARGE", 100)
    assert torch.equal(run(tiny("llama")), first)
    assert len(made) == 9 and len(list((tmp_path / "codes").iterdir())) == 9
    assert torch.equal(run(tiny("llama")), first) and len(made) == 9  # another model with the same weights
    other = tiny("llama")
    find_ffns(other)[0].up.weight.data += 0.01
    run(other)
    assert len(made) == 10  # only what is another
    run(tiny("llama"), **{"image.code": 5, "choice.fine": 0.3, "choice.tile": 8})
    assert len(made) == 19  # other numbers, and columns in another order
    for path in (tmp_path / "codes").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(run(tiny("llama")), first) and len(made) == 28
    assert stats_cache.folder() == tmp_path / "calibration"
