"""Thresholds from a calibration text (cats, m-countdown, prox), and prox with exact counts.

A text of n tokens runs dense, and layer by layer a threshold is made from what its F n numbers are:

cats         the quantile of |act(gate x)| that leaves the wanted share above it (cut to 10 bits of mantissa)
m-countdown  the mean over tokens of the k-th largest |up x| of each, for the wanted k
prox         as cats, of |h| as copies of gate and up in 4 bits (a scale a row) have it, x cut to its largest entries

Each decoded token then takes every neuron whose number is above the threshold, and writes it: `cats` reads all of gate,
and 2 more rows or columns of each such neuron; `prox` 3 of each, and of the copies the columns of the
entries that are left of x, and a scale of 16 bits for every row.
"""

import math

import pytest
import torch

from dart_eval.pruning.choices import thresholds
from dart_eval.util.bits import Rounding
from dart_eval.weights.rounding import rounded
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.derivations.test_choices import budget
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import PLAIN

TEXT = random_tokens(150, seed=7)
NEURONS, LAYERS, F, D = 120, 3, 40, 32


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


def thin(x, share):
    """[T, D] with the largest entries of each token alone."""
    return torch.stack([row * largest(row.abs(), int(share * len(row))) for row in x])


def shown(model, layer, x, share):
    """[T, F], h as copies of gate and up in 4 bits have it; of a plain FFN as one of up."""
    block = model.model.layers[layer].mlp if hasattr(model, "model") else model.transformer.h[layer].mlp
    if hasattr(block, "c_fc"):
        weights, biases, act = [block.c_fc.weight.T], [block.c_fc.bias], block.act
    else:
        weights, biases, act = [block.gate_proj.weight, block.up_proj.weight], [None, None], block.act_fn
        biases = [block.gate_proj.bias, block.up_proj.bias]
    copies = [rounded(w, Rounding(4, 0)).values.to(w.dtype) for w in weights]
    made = [thin(x, share) @ c.T + (0 if b is None else b) for c, b in zip(copies, biases, strict=True)]
    return act(made[0]) * made[1] if len(made) > 1 else act(made[0])


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


@pytest.mark.parametrize(("method", "looks", "family", "sparsity", "execution"), in_turn(
    [("cats", "a"), ("m-countdown", "u")],
    [("llama", 0.5, "masked"), ("gemma3", 0.4, "auto"), ("phi3", 0.6, "masked"), ("gpt2", 0.3, "masked"),
     ("opt", 0.2, "masked"), ("llama", 0.6, "auto")],
))  # fmt: skip
def test_tokens_take_what_is_above_the_threshold(method, looks, family, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(12, 1), random_tokens(6, 2)
    looks = "a" if family in PLAIN else looks
    calibrated = Plain(model)
    calibrated.run(TEXT)
    matrices = 2 if family in PLAIN else 3
    taken = [t for _, t, _ in budget(NEURONS, LAYERS, sparsity, matrices, True)]
    numbers = [getattr(seen, looks).float().abs() for seen in calibrated.seen]
    if method == "cats":
        least = [quantile(n, 1 - k / F) for n, k in zip(numbers, taken, strict=True)]
    else:
        least = [float(n.sort(descending=True).values[:, k - 1].mean()) for n, k in zip(numbers, taken, strict=True)]
    wanted, found = pruned(model, prompt, decoded, lambda i, seen: getattr(seen, looks)[0].abs() > least[i])
    run = ours.run(model, method, prompt, decoded, sparsity, execution, text, **{"choice.threshold": "calibrated"})
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=1e-9)
    assert run.read == pytest.approx([(NEURONS + (matrices - 1) * n) / (matrices * NEURONS) for n in found])
    assert len(set(run.read)) > 1 and abs(sum(run.read) / 6 - (1 - sparsity)) < 0.1


@pytest.mark.parametrize("threshold", ["none", "calibrated"])
@pytest.mark.parametrize(
    ("family", "sparsity", "share"), [("llama", 0.6, 0.5), ("qwen2", 0.4, 0.3), ("gpt2", 0.5, 1.0)]
)
def test_prox_reads_exactly_what_thinned_copies_show(family, sparsity, share, threshold):
    model, prompt, decoded = biased(family), random_tokens(12, 3), random_tokens(6, 4)
    matrices = 2 if family in PLAIN else 3
    # bits: 4 of each weight in a column that is read, 16 of each row's scale
    copies = (matrices - 1) * (4 * int(share * D) + 16) / (16 * D) * NEURONS
    rest = matrices * round((1 - sparsity) * NEURONS) - copies
    n = math.ceil(rest / matrices)
    exact = [rest / matrices / LAYERS] * LAYERS
    taken, written = counts(exact, n), counts(exact, math.floor(rest - (matrices - 1) * n))
    if threshold == "none":

        def kept_of(i, seen):
            kept = largest(shown(model, i, seen.x, share)[0].abs(), taken[i])
            return largest(seen.h[0].abs().masked_fill(~kept, -1), written[i])

        wanted, found = pruned(model, prompt, decoded, kept_of)
        read = [(copies + (matrices - 1) * n + sum(written)) / (matrices * NEURONS)] * 6
        assert max(read) <= 1 - sparsity
    else:
        calibrated = Plain(model)
        calibrated.run(TEXT)
        least = [
            quantile(shown(model, i, seen.x, share), 1 - k / F)
            for i, (seen, k) in enumerate(zip(calibrated.seen, taken, strict=True))
        ]
        wanted, found = pruned(
            model, prompt, decoded, lambda i, seen: shown(model, i, seen.x, share)[0].abs() > least[i]
        )
        read = [(copies + matrices * n) / (matrices * NEURONS) for n in found]
    run = ours.run(
        model, "prox", prompt, decoded, sparsity, "auto", text, **{"choice.thin": share, "choice.threshold": threshold}
    )
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=1e-9)
    assert run.read == pytest.approx(read)


@pytest.mark.parametrize("method", ["cats", "m-countdown", "prox"])
@pytest.mark.parametrize(("threshold", "takes"), [(-1e-30, 1.0), (1e9, 0.0)])
def test_a_threshold_below_zero_is_dense(method, threshold, takes, monkeypatch):
    """Every neuron is taken, those that are 0 too, whatever the sparsity; above all of them none is."""
    monkeypatch.setattr(thresholds.Thresholded, "_thresholds", lambda self, layers, *given: [threshold] * len(layers))
    model, prompt, decoded = biased("opt"), random_tokens(12, 5), random_tokens(6, 6)  # half of its h are 0
    dense = Plain(model)
    wanted = torch.cat([dense.run(prompt), *[dense.run([token]) for token in decoded]])
    run = ours.run(model, method, prompt, decoded, 0.4, "masked", text, **{"choice.threshold": "calibrated"})
    same = torch.isclose(run.logprobs, wanted, rtol=0, atol=1e-9).all(1)
    assert bool(same[: len(prompt)].all()) and bool(same[len(prompt) :].all()) == (takes == 1)
    # Of two matrices up tells h, and is read whole; what is taken is read of down.
    image = (4 + 16 / model.config.hidden_size) * 0.5 / 16 if method == "prox" else 0.0
    read = image / 2 + takes if method == "prox" else (1 + takes) / 2
    assert run.read == pytest.approx([read] * len(decoded), abs=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_at_all_of_x_and_all_bits_prox_is_the_exact_choice(family):
    """Gate and up read whole leave half of down at 5/6: the neurons that `oracle-token` takes at a half."""
    model, prompt, decoded = biased(family), random_tokens(12, 5), random_tokens(6, 6)
    all_of_it = {"image": "weights", "choice.thin": 1.0}
    found = ours.run(model, "prox", prompt, decoded, 0.5 / 3, **all_of_it)
    exact = ours.run(model, "oracle-token", prompt, decoded, 0.5)
    assert torch.allclose(found.logprobs, exact.logprobs, rtol=0, atol=1e-9)
    assert found.read == pytest.approx([5 / 6] * 6)
