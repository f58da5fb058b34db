"""Columns in graded bits: grinqh and decdec, on the three matrices of an FFN.

A matrix [out, n] is codes of B bits with a scale for each 128 weights of a row (`--ffn-bits B:128`). A token reads the
first b_i bits of the codes of column i, b_i of some levels; 0 bits are none of the column. With E(b) the squared error
of a column at b bits, the mean over the columns, its bits begin at the lowest level. Then the column is raised, level
by level, that saves most of sum_i x_i^2 E(b_i) for a bit: where several levels together save more for a bit than the
first of them alone, they are one raise, of which the lower level is taken first. It ends when the next level does not
fit the bits of the read: 16 (1 - s) a weight, less the scales'. Four first bits and more stand for the line that is
nearest to the matrix's codes, fewer for the mean of the codes that begin so, as a whole number. Prompts run on all bits
of the codes.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dart_eval
from dart_eval.pruning.methods.columns import Levels
from dart_eval.pruning.registry import make
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded
from tests.derivations import ours
from tests.derivations.plain import Plain
from tests.derivations.test_entries import D, F, ffns_of, thinned
from tests.helpers.models import biased, random_tokens, tiny
from tests.helpers.sessions import bits, open_session, same

METHODS = {"grinqh": "0-2-4-6-8", "decdec": "3-7"}
FINER = {"entries.levels": "0-2-3-4-5-6-8"}


def read_at(codes, bits):
    """[out, n] fp64, a matrix of which the first bits of the codes are read."""
    whole, all_bits = codes.codes.double().numpy(), codes.rounding.bits
    if not bits:
        return torch.zeros(whole.shape, dtype=torch.float64)
    first = np.floor((whole + 2 ** (all_bits - 1)) / 2 ** (all_bits - bits))
    line = np.polyfit(first.ravel(), whole.ravel(), 1) if bits < all_bits else (1, -(2 ** (all_bits - 1)))
    stands = np.polyval(line, first)
    if bits < 4:
        stands = sum((first == f) * np.rint(whole[first == f].mean()) for f in np.unique(first))
    scales = codes.scales.double().numpy().repeat(codes.rounding.group, 1)[:, : whole.shape[1]]
    return torch.tensor(scales * stands)


@contextlib.contextmanager
def on_codes(model, rounding):
    own = [[m.clone() for m, _ in parts] for _, parts in ffns_of(model)]
    with torch.no_grad():
        for _, parts in ffns_of(model):
            for m, _ in parts:
                m.copy_(read_at(rounded(m.detach(), rounding), rounding.bits))
        yield
        for (_, parts), weights in zip(ffns_of(model), own, strict=True):
            for (m, _), weight in zip(parts, weights, strict=True):
                m.copy_(weight)


def slopes(errors, levels):
    """What each raise of a column saves for a bit. errors: of a column at each level."""
    found = []
    while (now := len(found)) < len(levels) - 1:
        ahead = range(now + 1, len(levels))
        best, to = max(((errors[now] - errors[t]) / (levels[t] - levels[now]), t) for t in ahead)
        found += [max(0.0, best)] * (to - now)
    return torch.tensor(found).double().tolist()


def raised(squares, saved, levels, room):
    """The level of each column. squares: [n] x_i^2; saved: of `slopes`; room: bits for a row."""
    at = [0] * len(squares)
    room -= len(at) * levels[0]
    while True:
        ahead = [-1.0 if j == len(levels) - 1 else x * saved[j] for x, j in zip(squares, at, strict=True)]
        best = max(range(len(at)), key=ahead.__getitem__)
        if ahead[best] < 0 or (cost := levels[at[best] + 1] - levels[at[best]]) > room:
            return at
        room -= cost
        at[best] += 1


@pytest.mark.parametrize(("family", "method", "sparsity", "params"), [
    ("llama", "grinqh", 0.7, {}), ("gpt2", "grinqh", 0.6, FINER), ("phi3", "decdec", 0.7, {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("qwen2", "grinqh", 0.8, {}), ("opt", "decdec", 0.7, {}), ("llama", "grinqh", 0.6, FINER),
        ("phi3", "grinqh", 0.8, {}), ("gpt2", "grinqh", 0.7, {}), ("opt", "grinqh", 0.6, FINER),
        ("qwen2", "decdec", 0.7, {}),
    )),
])  # fmt: skip
def test_columns_are_read_in_the_bits_that_save_most(family, method, sparsity, params):
    levels = [int(level) for level in params.get("entries.levels", METHODS[method]).split("-")]
    model = biased(family)
    rounding = parse(f"{levels[-1]}:128")
    used = []

    def kept_of(i, k, weight, x):
        codes = rounded(weight, rounding)
        read = {b: read_at(codes, b) for b in levels}
        errors = [(weight - read[b]).double().square().sum().item() / len(x) for b in levels]
        beside = 16 / min(128, len(x))
        room = int(len(x) * (16 * (1 - sparsity) - beside) + 1e-9)
        at = raised(x.float().square().tolist(), slopes(errors, levels), levels, room)
        used.append((sum(levels[j] for j in at) + beside * len(x)) * len(weight) / 16)
        made = torch.stack([read[levels[j]][:, c] for c, j in enumerate(at)], 1)
        return made / torch.where(weight == 0, 1.0, weight)

    prompt, decoded = random_tokens(12, 1), random_tokens(6, 2)
    before = bits(model)
    run = ours.run(model, method, prompt, decoded, sparsity, "masked", **params)
    assert same(model, before)
    wanted, _ = thinned(model, prompt, decoded, kept_of, on_codes(model, rounding))
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=2e-6)
    weights = sum(m.numel() for _, parts in ffns_of(model) for m, _ in parts)
    assert run.read == pytest.approx([sum(u) / weights for u in np.array_split(used, 6)])
    assert max(run.read) <= 1 - sparsity + 1e-9 and min(run.read) > 1 - sparsity - 0.02


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_no_other_bits_have_less_error(data):
    """Against all assignments of at most as many bits, where errors are convex in bits."""
    levels = Levels(data.draw(st.sampled_from(["0-2-4-8", "2-4-8", "3-7", "0-2-3-4-5-6"])), 128)
    n = data.draw(st.integers(1, 4))
    drops = np.sort([data.draw(st.floats(0.0078125, 10, width=32)) for _ in levels.bits[1:]])[::-1]
    errors = np.append((drops * np.diff(levels.bits))[::-1].cumsum()[::-1], 0)
    x = np.array([data.draw(st.floats(-4, 4, width=32)) for _ in range(n)])
    room = data.draw(st.integers(levels.bits[0] * n, levels.bits[-1] * n + 3))
    gains = levels.gains(torch.tensor(errors.copy(), dtype=torch.float32))
    at = levels.choose(torch.tensor(x, dtype=torch.float32), gains, room).tolist()
    spent = sum(levels.bits[j] for j in at)
    assert spent <= room

    def error(assigned):
        return sum(x[i] ** 2 * errors[j] for i, j in enumerate(assigned))

    others = itertools.product(range(len(levels.bits)), repeat=n)
    least = min(error(other) for other in others if sum(levels.bits[j] for j in other) <= spent)
    assert error(at) <= least + 1e-4 * (1 + least)
    steps = np.diff(levels.bits)
    assert spent == levels.bits[-1] * n or room - spent < steps.max()  # or nothing more fits


def test_levels_that_save_nothing_alone_are_one_step():
    """Four bits of a small weight among large ones are worse than none, and eight are better."""
    levels = Levels("0-4-8", 128)
    gains = levels.gains(torch.tensor([1.0, 3.0, 0.0]))
    assert gains.tolist() == pytest.approx([1 / 8, 1 / 8])
    assert levels.choose(torch.tensor([9.0, 1.0]), gains, 8).tolist() == [2, 0]
    assert levels.choose(torch.tensor([0.1, 1.0]), gains, 8).tolist() == [0, 2]


def test_two_levels_take_the_largest_inputs():
    """decdec's: the residuals of the k largest |x_i|, by hand; and teal's columns with the levels 0 and 8."""
    x = torch.tensor([0.3, -2.0, 1.0, 0.0, -0.5])
    for text, room, top in (("3-7", 3 * 5 + 4 * 2, 2), ("0-8", 8 * 3, 3)):
        levels = Levels(text, 128)
        at = levels.choose(x, levels.gains(torch.tensor([4.0, 0.1])), room + 1)
        assert set(at.nonzero().flatten().tolist()) == set(x.abs().topk(top).indices.tolist())


def test_one_level_is_rounding():
    """Levels of one number: what `rounding` reads, to the bit."""
    model, prompt, decoded = tiny("llama"), random_tokens(12, 1), random_tokens(4, 2)
    run = ours.run(model, "grinqh", prompt, decoded, 0.45, "auto", **{"entries.levels": "8", "entries.group": 32})
    assert run.read[0] == pytest.approx((8 * 3 + 2 * 16 / D + 2 * 16 / F) / 3 / 16)  # F is a group and a part of one
    with on_codes(model, parse("8:32")):  # prompts, too
        plain = Plain(model)
        wanted = torch.cat([plain.run(prompt), *(plain.run([token]) for token in decoded)])
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=2e-6)


def test_bytes_beyond_the_levels_and_weights_of_few_bits_are_refused():
    model, method = tiny("llama"), make("grinqh", {"entries.levels": "4-8"})
    for sparsity in (0.8, 0.3):
        with pytest.raises(UserError, match=r"from 0\.469 to 0\.718"), open_session(model, method, sparsity):
            pass
    with dart_eval.rounded_ffns(model, 4), pytest.raises(UserError, match="16-bit"), open_session(model, "grinqh", 0.7):
        pass


def test_a_token_multiplies_all_that_it_reads():
    """Fewer bits are no fewer products."""
    for method in ("grinqh", "rounding", "teal"):
        with open_session(tiny("llama"), method, 0.7) as session:
            assert session.method.computed(0.3) == pytest.approx(0.3 if method == "teal" else 1.0)
