"""Thresholds from a calibration text (cats).

A text of n tokens runs dense, and layer by layer a threshold is made from what its F n numbers are:

cats  the quantile of |act(gate x)| that leaves the wanted share above it (cut to 10 bits of mantissa)

Each decoded token then takes every neuron whose number is above the threshold, and writes it: `cats` reads all of gate,
and 2 more rows or columns of each such neuron.
"""

import math

import pytest
import torch

from dart_eval.pruning.methods.cats import Cats
from tests.derivations import ours
from tests.derivations.plain import Plain
from tests.derivations.test_choices import budget
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import PLAIN

TEXT = random_tokens(150, seed=7)
NEURONS, LAYERS, F = 120, 3, 40


def text(_text, **_):
    return {"input_ids": TEXT}


def cut(value):
    """The number with the first 10 bits of its mantissa alone."""
    part, exponent = math.frexp(value)
    return math.ldexp(math.floor(part * 2048) / 2048, exponent)


def quantile(numbers, share):
    """The least of the numbers that have this share of all at or below them."""
    ordered = sorted(numbers.float().abs().flatten().tolist())
    return cut(ordered[math.ceil(share * len(ordered) - 1e-9) - 1])


def pruned(model, prompt, decoded, kept_of):
    """Log-probabilities of what follows, and how many neurons each token took. kept_of: layer, seen -> [F] bool."""
    plain, taken = Plain(model), []
    rows, found = [plain.run(prompt)], []

    def change(i, h):
        kept = kept_of(i, plain.seen[i])
        taken.append(int(kept.sum()))
        return h * kept

    for token in decoded:
        taken.clear()
        rows.append(plain.run([token], change))
        found.append(sum(taken))
    return torch.cat(rows), found


@pytest.mark.parametrize(("family", "sparsity", "execution"), [
    ("llama", 0.5, "masked"), ("gemma3", 0.4, "auto"), ("phi3", 0.6, "masked"), ("gpt2", 0.3, "masked"),
    ("opt", 0.2, "masked"), ("llama", 0.6, "auto"),
])  # fmt: skip
def test_tokens_take_what_is_above_the_threshold(family, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(12, 1), random_tokens(6, 2)
    calibrated = Plain(model)
    calibrated.run(TEXT)
    matrices = 2 if family in PLAIN else 3
    taken = [t for t, _ in budget(NEURONS, LAYERS, sparsity, matrices, True)]
    numbers = [seen.a.float().abs() for seen in calibrated.seen]
    least = [quantile(n, 1 - k / F) for n, k in zip(numbers, taken, strict=True)]
    wanted, found = pruned(model, prompt, decoded, lambda i, seen: seen.a[0].abs() > least[i])
    run = ours.run(model, "cats", prompt, decoded, sparsity, execution, text, **{"choice.threshold": "calibrated"})
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=1e-9)
    assert run.read == pytest.approx([(NEURONS + (matrices - 1) * n) / (matrices * NEURONS) for n in found])
    assert len(set(run.read)) > 1 and abs(sum(run.read) / 6 - (1 - sparsity)) < 0.1


@pytest.mark.parametrize(("threshold", "takes"), [(-1e-30, 1.0), (1e9, 0.0)])
def test_a_threshold_below_zero_is_dense(threshold, takes, monkeypatch):
    """Every neuron is taken, those that are 0 too, whatever the sparsity; above all of them none is."""
    monkeypatch.setattr(Cats, "_measured", lambda self, *given: torch.tensor([threshold] * LAYERS, dtype=torch.float64))
    model, prompt, decoded = biased("opt"), random_tokens(12, 5), random_tokens(6, 6)  # half of its h are 0
    dense = Plain(model)
    wanted = torch.cat([dense.run(prompt), *[dense.run([token]) for token in decoded]])
    run = ours.run(model, "cats", prompt, decoded, 0.4, "masked", text, **{"choice.threshold": "calibrated"})
    same = torch.isclose(run.logprobs, wanted, rtol=0, atol=1e-9).all(1)
    assert bool(same[: len(prompt)].all()) and bool(same[len(prompt) :].all()) == (takes == 1)
    # Of two matrices up tells h, and is read whole; what is taken is read of down.
    assert run.read == pytest.approx([(1 + takes) / 2] * len(decoded), abs=0.02)
