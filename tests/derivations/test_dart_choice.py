"""dart-choice (ours; docs/findings.md): a wide mask, inside which each token chooses its neurons.

A token need not use all neurons of a mask, if it can tell cheaply which it needs. With equal FFN weights read - of
three matrices of F neurons, a share 1 - sparsity - the mask may then be wider. K is the neurons that a mask alone would
keep, (1 - sparsity) of all; the rows and columns that may be read are 3 K:

    the mask        M = 1.6 K neurons: their rows of gate are read
    up              P of them, those with the largest |act(gate x)_j| * rms_j,  rms_j = sqrt(mean_t (up x_t)_j^2)
    down            0.6 P of these, those with the largest |h_j|,  h = act(gate x) * up x;  M + P + 0.6 P = 3 K

An FFN without a gate has two matrices: rows of up for the mask, columns of down for P = 2 K - M, by |h_j|.

The mask has the neurons with the largest scores S_j = mean_t (h_tj / ||h_t||)^2, as many in every layer (where that is
no whole number, the first layers have one more). What the neurons outside of it added to a token of the prompt on
average, the down projection of mean_t h_t there, is added to the output of every decoded token, a constant.

With each re-mask - from the last R inputs of the FFN, see test_dart_drift - scores, rms and mean move on together:

    S <- B S + (1 - B) S of these R tokens,   and so for the mean of (up x)^2 and the mean of h
"""

import math

import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, largest
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import RESTLESS


def shares(neurons, layers, sparsity, wide, down, gated):
    """Per layer: neurons of the mask, of up, of down."""
    k = round((1 - sparsity) * neurons)
    rows = (3 if gated else 2) * k
    m = min(round(wide * k), neurons, rows)
    if gated and down == 1:
        m -= (rows - m) % 2  # the rest is for two matrices alike
    p = math.ceil((rows - m) / (1 + down)) if gated else rows - m
    each = (m, p, rows - m - p if gated else p)
    return [[total // layers + (i < total % layers) for total in each] for i in range(layers)]


def statistics(a, u):
    """Per neuron, means over tokens: of the score, of (up x)^2 where there is a gate, of h."""
    h = a if u is None else a * u
    score = (h / h.norm(dim=1, keepdim=True)) ** 2
    return [score.mean(0), torch.zeros(()) if u is None else (u**2).mean(0), h.mean(0)]


def dart_choice(model, prompt, decoded, sparsity, wide, down, compensate, ring, blend, every):
    """Masks after the prompt and after each decoded token, log-probabilities. every: tokens between re-masks."""
    plain = Plain(model)
    rows, layers = [plain.run(prompt)], range(len(plain.layers))
    known, inputs = [statistics(seen.a, seen.u) for seen in plain.seen], [seen.x for seen in plain.seen]
    gated, size = plain.seen[0].u is not None, plain.seen[0].h.shape[1]
    count = shares(size * len(layers), len(layers), sparsity, wide, down, gated)
    masks = [[largest(known[i][0], count[i][0]) for i in layers]]

    def choose(i, h, mask):
        _, up, written = count[i]
        a = plain.seen[i].a[0].abs()
        kept = largest((a * known[i][1].sqrt() if gated else a).masked_fill(~mask, -1), up)
        return h * largest(h[0].abs().masked_fill(~kept, -1), written)

    def constant(i, mask):
        bias = plain.layers[i].down(torch.zeros(size, dtype=torch.float64))
        return plain.layers[i].down(known[i][2] * ~mask) - bias

    for n, token in enumerate(decoded, 1):
        now = masks[-1]
        added = [constant(i, now[i]) if compensate else 0 for i in layers]
        rows.append(plain.run([token], lambda i, h, now=now: choose(i, h, now[i]), added))
        inputs = [torch.cat([inputs[i], plain.seen[i].x]) for i in layers]
        if n % every == 0:
            for i in layers:
                recent = statistics(*plain.layers[i].parts(inputs[i][-ring:]))
                known[i] = [blend * old + (1 - blend) * new for old, new in zip(known[i], recent, strict=True)]
            now = [largest(known[i][0], count[i][0]) for i in layers]
        masks.append(now)
    return masks, torch.cat(rows)


STEADY = {
    "remask": "every", "remask.tokens": 4, "remask.blend": 0.7, "remask.ring": 8, "remask.old": "running",
}  # fmt: skip
ALARMS = {**RESTLESS, "remask.ring": 8}  # every window of three tokens raises the alarm; the blend is the preset's, 0.8


@pytest.mark.parametrize(("family", "seed", "execution", "sparsity", "wide", "down", "compensate", "remask"), [
    ("llama", 0, "copied", 0.5, 1.6, 0.6, False, STEADY), ("llama", 1, "masked", 0.63, 1.4, 0.5, True, ALARMS),
    ("llama", 2, "copied", 0.6, 1.6, 1.0, False, ALARMS), ("gemma3", 3, "copied", 0.7, 1.6, 0.6, True, ALARMS),
    ("phi3", 4, "masked", 0.5, 1.6, 0.6, False, STEADY), ("gpt2", 5, "copied", 0.63, 1.6, 0.6, True, ALARMS),
    ("opt", 6, "masked", 0.5, 1.6, 0.6, False, STEADY), ("opt", 7, "copied", 0.7, 1.3, 0.6, True, STEADY),
])  # fmt: skip
def test_dart_choice_is_its_formula(family, seed, execution, sparsity, wide, down, compensate, remask):
    model, prompt, decoded = biased(family), random_tokens(19, seed), random_tokens(13, seed + 10)
    settings = {**remask, "choice.mask_ratio": wide, "choice.write_share": down}
    if not compensate:
        settings["compensation"] = "none"
    found = ours.run(model, "dart-choice", prompt, decoded, sparsity, execution=execution, **settings)
    every, blend = (4, 0.7) if remask is STEADY else (3, 0.8)
    masks, logprobs = dart_choice(model, prompt, decoded, sparsity, wide, down, compensate, 8, blend, every)
    assert [n for n, _ in found.remasks] == list(range(every, 14, every))
    assert all(ours.same_masks(a, b) for a, b in zip(found.masks, masks, strict=True))
    # The constant is kept in float32.
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-5 if compensate else 1e-9)
    assert found.read == pytest.approx([round((1 - sparsity) * 120) / 120] * 13)
