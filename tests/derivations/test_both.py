"""graded-both: more bits of columns and of neurons, of codes of 8 bits as `grinqh` has them.

The read leaves b = 16 (1 - s) bits of a weight, less the scales'. Of gate and up (a plain FFN's up) a token first
reads b - .25 * 2 bits of a weight, columns raised as in `grinqh`. With h~ and the products g, u by these bits,

    e^2    = mean over rows of sum_i x_i^2 (E(b_i) - E(8)) of a matrix, E on its convex hull over bits
    E[h^2] = mean of act(g +- e_g)^2 * (u^2 + e_u^2)

the quarter of the neurons with the largest E[h^2] - .8 h~^2 is read again, at 2 bits of a weight more and 8 at most. If
all 8 bits are read then, the first look has what the read leaves. Down is read with b bits, columns raised by h.
"""

import numpy as np
import pytest
import torch

from dart_eval.pruning.methods.both import GradedBoth
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded
from tests.derivations import ours
from tests.derivations.test_columns import on_codes, raised, read_at, slopes
from tests.derivations.test_entries import F, ffns_of, thinned
from tests.helpers.models import biased, random_tokens, tiny
from tests.helpers.sessions import bits, open_session, same

LEVELS = [0, 2, 4, 6, 8]


def scale(weight):
    """Bits of a weight for scales."""
    return 16 / min(128, weight.shape[1])


class Matrix:
    """One matrix, an input of it, and what is read at some bits of a row."""

    def __init__(self, weight, bias, x):
        codes = rounded(weight, parse("8:128"))
        self.weight, self.bias, self.x = weight, bias, x
        self.read = {b: read_at(codes, b) for b in LEVELS}
        errors = [(weight - self.read[b]).double().square().sum().item() / len(x) for b in LEVELS]
        self.saved, self.scale = slopes(errors, LEVELS), scale(weight)

    def at(self, room):
        """The level of each column, and the rows so read. room: bits of a row."""
        at = raised(self.x.float().square().tolist(), self.saved, LEVELS, room)
        return at, torch.stack([self.read[LEVELS[j]][:, c] for c, j in enumerate(at)], 1)

    def product(self, rows):
        out = rows.to(self.x.dtype) @ self.x
        return out if self.bias is None else out + self.bias

    def error(self, at):
        """The root of the mean over rows of what the bits that are not read would save."""
        left = sum(x * 2 * sum(self.saved[j:]) for x, j in zip(self.x.double() ** 2, at, strict=True))
        return (left / len(self.weight)) ** 0.5


@pytest.mark.parametrize(("family", "sparsity"), [
    ("llama", 0.47), ("gpt2", 0.7), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("qwen2", 0.5), ("phi3", 0.6), ("opt", 0.47), ("llama", 0.6), ("qwen2", 0.7), ("phi3", 0.47), ("gpt2", 0.5),
        ("opt", 0.6),
    )),
])  # fmt: skip
def test_columns_then_neurons_are_read_in_more_bits(family, sparsity):
    model, used, chosen = biased(family), [], {}
    count = int(0.25 * F)

    def kept_of(i, k, weight, x):
        act, parts = ffns_of(model)[i]
        room = 16 * (1 - sparsity) - scale(weight)
        if k == len(parts) - 1:
            one = Matrix(weight, None, x)
            at, made = one.at(int(len(x) * room + 1e-9))
            used.append((sum(LEVELS[j] for j in at) + one.scale * len(x)) * len(weight) / 16)
            return made / torch.where(weight == 0, 1.0, weight)
        first = room - 0.5 if room - 0.5 + 2 <= 8 else (room - 2) / 0.75
        limit = int(len(x) * first + 1e-9)
        ins = [Matrix(w, b, x) for w, b in parts[:-1]]
        looks = [one.at(limit) for one in ins]
        if k == 0:
            g, *u = (one.product(made) for one, (_, made) in zip(ins, looks, strict=True))
            e, *eu = (one.error(at) for one, (at, _) in zip(ins, looks, strict=True))
            expected, h = (act(g + e) ** 2 + act(g - e) ** 2) / 2, act(g)
            if u:
                expected, h = expected * (u[0] ** 2 + eu[0] ** 2), h * u[0]
            wanted = (expected - 0.8 * h**2).clamp(min=0)
            chosen[i] = wanted.argsort(descending=True, stable=True)[:count]
        (at, made), one = looks[k], ins[k]
        further, again = one.at(min(8 * len(x), limit + 2 * len(x)))
        made = made.clone()
        made[chosen[i]] = again[chosen[i]]
        more = sum(LEVELS[b] - LEVELS[a] for a, b in zip(at, further, strict=True))
        spent = F * sum(LEVELS[j] for j in at) + count * more
        used.append((spent + F * one.scale * len(x)) / 16)
        return made / torch.where(weight == 0, 1.0, weight)

    prompt, decoded = random_tokens(12, 1), random_tokens(6, 2)
    before = bits(model)
    run = ours.run(model, "graded-both", prompt, decoded, sparsity, "masked")
    assert same(model, before)
    wanted, _ = thinned(model, prompt, decoded, kept_of, on_codes(model, parse("8:128")))
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=4e-6)
    weights = sum(m.numel() for _, parts in ffns_of(model) for m, _ in parts)
    assert run.read == pytest.approx([sum(u) / weights for u in np.array_split(used, 6)])
    assert max(run.read) <= 1 - sparsity + 1e-9 and min(run.read) > 1 - sparsity - 0.02


def test_it_does_not_matter_whether_the_model_calls_up_or_gate_first():
    """Falcon-H1 calls up first."""
    model, prompt, decoded, found = biased("llama"), random_tokens(12, 1), random_tokens(6, 2), []
    for first in ("gate", "up"):
        if first == "up":
            for mlp in (layer.mlp for layer in model.model.layers):
                mlp.forward = lambda x, m=mlp: m.down_proj(m.up_proj(x) * m.act_fn(m.gate_proj(x)))
        found.append(ours.run(model, "graded-both", prompt, decoded, 0.6, "masked").logprobs)
    assert torch.equal(*found)


def test_a_second_look_ends_at_all_bits_and_at_what_the_read_leaves():
    method = GradedBoth(entries_neurons=0.5, entries_more=4)
    assert method.first_look(7.0) == 6.0 and method.first_look(5.0) == 3.0
    assert GradedBoth(entries_neurons=0.25, entries_levels="4-8", entries_more=6).fewest == 5.0  # a quarter in 8 bits
    with pytest.raises(UserError, match=r"15\.6 to 53\.1 %"), open_session(tiny("llama"), method, 0.88):
        pass


def test_neurons_of_a_second_look_are_whole():
    """.29 * 6400 is 1855.9999999999998 in floating point."""
    method, up = GradedBoth(entries_neurons=0.29), torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    assert int(method.least_known([up], [torch.ones(1, 1)], torch.relu, None).sum()) == 1856
