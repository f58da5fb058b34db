"""Wanda-sp: the score of Wanda (arXiv 2306.11695), for whole neurons, as FLAP (arXiv 2312.11983) has it.

Wanda scores a weight by its size times the norm of what it multiplies. On a calibration text, whose tokens are t,

    s_ij = |W_ij| * ||h_j||_2,    ||h_j||_2 = sqrt( sum_t h_tj^2 ),

W being the down projection, whose column j is what neuron j writes. A neuron has the mean of its column:

    s_j = mean_i |W_ij| * ||h_j||_2

The same share is kept in every layer, for good: no prompt changes it. The text runs in pieces of at most 512 tokens,
no longer than the model has positions; each begins with the token that begins every text, which is not counted.
"""

import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, alike
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens

TEXT, BOS, POSITIONS = random_tokens(600, seed=3), 1, 256  # positions of the tiny models


def passages(model):
    """Per layer, the h of every piece of the text, [T, F]."""
    found = []
    for start in range(0, len(TEXT), POSITIONS - 1):
        plain = Plain(model)
        plain.run([BOS, *TEXT[start : start + POSITIONS - 1]])
        found.append([seen.h[1:].detach().numpy() for seen in plain.seen])
    return list(zip(*found, strict=True))


def wanda_sp(model, sparsity):
    """The masks of all layers."""
    squares = [torch.from_numpy(sum((h**2).sum(0) for h in pieces)) for pieces in passages(model)]
    plain, scores = Plain(model), []
    for layer, h_squared in zip(plain.layers, squares, strict=True):
        w = layer.down.weight.T if model.config.model_type == "gpt2" else layer.down.weight  # [D, F]
        scores.append(w.abs().mean(0) * h_squared.sqrt())
    return alike(scores, sparsity)


class OneText:
    """A tokenizer for which every text has the same tokens."""

    bos_token_id = BOS

    def __call__(self, text, **_):
        return {"input_ids": [BOS, *TEXT]}


@pytest.mark.parametrize(("family", "sparsity"), in_turn(["llama", "gemma3", "opt", "gpt2", "phi3"], [0.5, 0.63]))
def test_wanda_sp_is_its_formula(family, sparsity):
    model = biased(family)
    masks, prompt, decoded = wanda_sp(model, sparsity), random_tokens(8, seed=1), random_tokens(4, seed=2)
    found = ours.run(model, "wanda-sp", prompt, decoded, sparsity, tokenizer=OneText())
    found.check(masks, Plain(model).masked(prompt, decoded, masks))
