"""What each token computes of an FFN, where tokens choose: cats, m-countdown, oracle-token.

A gated FFN has a = act(gate x), u = up x, h = a * u and an output down h; a plain one has h = act(up x). All L layers
together have N neurons, of which a mask alone would keep K = (1 - sparsity) N. Three matrices (two, of a plain FFN)
have 3 N rows and columns; a token may read 3 K of them, as many in every layer, in whole numbers that sum up to that.

cats          CATS (arXiv 2404.08763), with a count in place of its threshold: gate is read for all N neurons. What is
              left is for up and down alike: P = (3 K - N) / 2 neurons have the largest |a|; their rows of up and
              columns of down are read. (If 3 K - N is odd, one more row of up: down leaves out the least |h|.)
m-countdown   M-COUNTDOWN (arXiv 2505.17701), with a count in place of its threshold: the same with u in place of a.
oracle-token  the K neurons with the largest |h|, as if h were known.

A plain FFN's up is all that is before h: it is read whole, and P = 2 K - N columns of down have the largest |h|.

With thresholds from a calibration text, `cats` takes every neuron whose |act(gate x)| is above the layer's: the
quantile that leaves the wanted share of the text's numbers above it (cut to 10 bits of mantissa). It writes all of
them: gate is read whole, and 2 more rows or columns of each such neuron.
"""

import math

import pytest
import torch

from dart_eval.pruning.methods.cats import Cats
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import PLAIN, fitting

WHOLE = {"cats": "a", "m-countdown": "u", "oracle-token": ""}


def budget(neurons, layers, sparsity, matrices, whole):
    """Per layer: the neurons that are taken, and those that are written."""
    exact = (1 - sparsity) * neurons
    rest = matrices * round(exact) - whole * neurons
    alike = matrices - whole  # matrices of which what is taken is read
    taken = math.ceil(rest / alike)
    written = rest - (alike - 1) * taken
    share = (matrices * exact - whole * neurons) / alike
    return [*zip(*(counts([share / layers] * layers, total) for total in (taken, written)), strict=True)]


def chosen(model, prompt, decoded, sparsity, by):
    """Log-probabilities of what follows each token. by: what a token looks at, `a`, `u` or nothing but h."""
    plain = Plain(model)
    rows = [plain.run(prompt)]
    gated, layers = plain.seen[0].u is not None, len(plain.seen)
    neurons = sum(seen.h.shape[1] for seen in plain.seen)
    count = budget(neurons, layers, sparsity, 3 if gated else 2, bool(by))

    def change(i, h):
        look = getattr(plain.seen[i], by) if by and gated else h
        kept = largest(look[0].abs(), count[i][0])
        return h * largest(h[0].abs().masked_fill(~kept, -1), count[i][1])

    rows += [plain.run([token], change) for token in decoded]
    return torch.cat(rows)


@pytest.mark.parametrize(("method", "family", "seed", "sparsity", "execution"), in_turn(
    ["cats", "m-countdown", "oracle-token"],
    [("llama", 0, 0.5, "masked"), ("llama", 1, 0.63, "auto"), ("qwen2", 2, 0.3, "masked"),
     ("gemma3", 3, 0.47, "auto"), ("phi3", 4, 0.6, "masked"), ("gpt2", 5, 0.5, "masked"), ("opt", 6, 0.37, "auto")],
))  # fmt: skip
def test_a_token_computes_what_it_needs_most(method, family, seed, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(12, seed), random_tokens(6, seed + 10)
    sparsity = fitting(method, family, sparsity)
    found = ours.run(model, method, prompt, decoded, sparsity, execution=execution)
    logprobs = chosen(model, prompt, decoded, sparsity, WHOLE[method])
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-9)
    assert found.read == [pytest.approx(round((1 - sparsity) * 120) / 120, abs=1e-15)] * 6
    assert all(bool(m.all()) for masks in found.masks for m in masks)


# -- thresholds from a calibration text --------------------------------------------------------------------------------


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
