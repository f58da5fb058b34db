"""POP (arXiv 2602.06822): a core of neurons from the prompt, and candidates that every token ranks anew.

The prompt's tokens give Wanda's score to each of a layer's F neurons (test_wanda_sp, on the prompt for a text):
mean_i |W_ij| * ||h_j||. A token reads gate and up of a mask of M neurons, and down of k of them. Of the ranking

    the first (1 - width) k, rounded down, are the core, which every token has; the first M are core and candidates

and M - (1 - width) k = width F: M = k + width (F - k). A token has the core and, up to k, the candidates with the
largest mean_i |W_ij| * |h_tj| of its own. With m matrices (3, or 2 of a plain FFN) it may read m K neurons' rows and
columns, K being what a mask alone would keep: (m - 1) M + k = m K. In whole numbers M is rounded, over all layers
together, and k is what is left.
"""

import math

import numpy as np
import pytest
import torch

from dart_eval.layers.shape import ModelShape
from dart_eval.pruning.choices.pop import Candidates
from dart_eval.pruning.cost import overhead
from dart_eval.pruning.masks.counts import Budget
from dart_eval.pruning.registry import make
from dart_eval.util.errors import UserError
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.models import biased, random_tokens


def sizes(f, layers, sparsity, width, m):
    """M and k of every layer."""
    read = (1 - sparsity) * f
    k = (m * read - (m - 1) * width * f) / ((m - 1) * (1 - width) + 1)
    wide = k + width * (f - k)
    masked = round(wide * layers)
    left = m * round((1 - sparsity) * f * layers) - (m - 1) * masked
    return counts([wide] * layers, masked), counts([k] * layers, left)


def pop(model, prompt, decoded, sparsity, width):
    """The masks, and log-probabilities of what follows each token."""
    plain = Plain(model)
    rows = [plain.run(prompt)]
    turned = model.config.model_type == "gpt2"
    means = [(lay.down.weight.T if turned else lay.down.weight).detach().abs().mean(0).numpy() for lay in plain.layers]
    scores = [w * np.linalg.norm(seen.h.numpy(), axis=0) for w, seen in zip(means, plain.seen, strict=True)]
    m = 2 if plain.seen[0].u is None else 3
    wide, k = sizes(len(scores[0]), len(scores), sparsity, width, m)
    masks = [largest(torch.tensor(s), n) for s, n in zip(scores, wide, strict=True)]
    cores = [largest(torch.tensor(s), math.floor((1 - width) * n + 1e-9)) for s, n in zip(scores, k, strict=True)]

    def change(i, h):
        now = torch.tensor(means[i]) * h[0].abs()
        return h * largest(now.masked_fill(~masks[i], -1).masked_fill(cores[i], torch.inf), k[i])

    rows += [plain.run([token], change) for token in decoded]
    return masks, torch.cat(rows)


@pytest.mark.parametrize(("family", "sparsity", "width", "execution"), [
    ("llama", 0.5, 0.1, "masked"), ("gemma3", 0.63, 0.1, "copied"), ("phi3", 0.7, 0.25, "copied"),
    ("gpt2", 0.5, 0.3, "copied"), ("opt", 0.4, 0.1, "masked"), ("llama", 0.3, 1.0, "copied"),
    ("qwen2", 0.63, 0.0, "masked"),  # no candidates
])  # fmt: skip
def test_pop_is_its_formula(family, sparsity, width, execution):
    model, prompt, decoded = biased(family), random_tokens(21, seed=1), random_tokens(6, seed=2)
    masks, logprobs = pop(model, prompt, decoded, sparsity, width)
    found = ours.run(model, "pop", prompt, decoded, sparsity, execution=execution, **{"choice.width": width})
    assert all(ours.same_masks(now, masks) for now in found.masks)
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-9)
    assert found.read == [pytest.approx(round((1 - sparsity) * 120) / 120, abs=1e-15)] * 6


def test_with_all_neurons_as_candidates_gate_and_up_are_read_whole():
    model, prompt, decoded = biased("llama"), random_tokens(21, seed=1), random_tokens(6, seed=2)
    wide = {"choice.width": 1.0, "score": "activation"}
    with pytest.raises(UserError, match=r"ranks 1 of the neurons by 2 of the FFN's 3 matrices.*a sparsity up to 0\.33"):
        ours.run(model, "pop", prompt, decoded, 0.34, **wide)


def test_a_tokens_flops_and_reads_by_hand():
    """1000 neurons in each of 2 layers at 70 %: k = (.9 - .2) / 2.8 = .25, M = .25 + .1 * .75 = .325."""
    found = Candidates().counts(Budget([0.3, 0.3], [1000, 1000], 0.7, 3, False))
    assert (found.mask, found.taken, found.written, found.full_matrices) == ([325, 325], [250, 250], [250, 250], 2)
    assert Candidates().core(torch.tensor([250])).tolist() == [225]  # and 100 candidates: 225 + 100 = 325
    assert Candidates().mask_share(0.3, 3) == pytest.approx(0.325)
    shape = ModelShape(2, 64, (1000, 1000), 3, 0, 0, (0, 0), (None, None), 0)
    added = overhead(make("pop"), shape, 10, 0.3)
    assert added.decode_step == pytest.approx(3 * 200)  # a square, a factor and a comparison for each candidate
    assert added.prefill == 10 * 2 * 2000  # a square and a sum for each neuron of ten tokens
    assert (added.remask, added.remask_read) == (0, 0)
