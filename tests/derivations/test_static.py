"""The rivals with one mask for all texts, which no prompt changes. Each keeps the same share in every layer.

`magnitude`, the static baseline of GRIFFIN (arXiv 2404.01365): rows of gate and up, w_j and v_j, or up alone, have

    s_j = ||w_j||_2 * ||v_j||_2

`static` is GRIFFIN's score with the tokens t of a calibration text in place of those of a prompt:

    s_j = || ( h_tj / ||h_t||_2 )_t ||_2

`wanda-sp` is the score of Wanda (arXiv 2306.11695), for whole neurons, as FLAP (arXiv 2312.11983) has it. Wanda scores
a weight by its size times the norm of what it multiplies. On a calibration text, whose tokens are t,

    s_ij = |W_ij| * ||h_j||_2,    ||h_j||_2 = sqrt( sum_t h_tj^2 ),

W being the down projection, whose column j is what neuron j writes. A neuron has the mean of its column:

    s_j = mean_i |W_ij| * ||h_j||_2

The text runs in pieces of at most 512 tokens, no longer than the model has positions; each begins with the token that
begins every text, which is not counted.
"""

import functools

import numpy as np
import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, alike
from tests.derivations.test_entries import ffns_of
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens

TEXT, BOS, POSITIONS = random_tokens(600, seed=3), 1, 256  # positions of the tiny models


@functools.lru_cache(maxsize=1)
def passages(model):
    """Per layer, the h of every piece of the text, [T, F]."""
    found = []
    for start in range(0, len(TEXT), POSITIONS - 1):
        plain = Plain(model)
        plain.run([BOS, *TEXT[start : start + POSITIONS - 1]])
        found.append([seen.h[1:].detach().numpy() for seen in plain.seen])
    return list(zip(*found, strict=True))


class OneText:
    """A tokenizer for which every text has the same tokens."""

    bos_token_id = BOS

    def __call__(self, text, **_):
        return {"input_ids": [BOS, *TEXT]}


def rows_and_column(model, layer):
    """The matrices into h, [F, D] each, and down as [F, D]."""
    *into, down = (w.detach().numpy() for w, _ in ffns_of(model)[layer][1])
    return into, down.T


def magnitude(model, layer):
    rows, _ = rows_and_column(model, layer)
    return np.prod([np.sqrt((w**2).sum(1)) for w in rows], axis=0)


def static(model, layer):
    votes = (h / np.sqrt((h**2).sum(1, keepdims=True)) for h in passages(model)[layer])
    return np.sqrt(sum((v**2).sum(0) for v in votes))


def wanda_sp(model, layer):
    squares = sum((h**2).sum(0) for h in passages(model)[layer])
    return np.abs(rows_and_column(model, layer)[1]).mean(1) * np.sqrt(squares)


SCORES = {"magnitude": magnitude, "static": static, "wanda-sp": wanda_sp}


@pytest.mark.parametrize(("family", "name"), in_turn(["llama", "gemma3", "opt", "gpt2", "phi3"], [*SCORES]))
def test_one_mask_for_all_texts_is_its_formula(family, name):
    model, sparsity, decoded = biased(family), 0.63, random_tokens(4, seed=9)
    masks = alike([torch.from_numpy(SCORES[name](model, i)) for i in range(len(Plain(model).layers))], sparsity)
    for seed in (1, 2):  # whatever the prompt
        prompt = random_tokens(8, seed)
        found = ours.run(model, name, prompt, decoded, sparsity, tokenizer=OneText())
        found.check(masks, Plain(model).masked(prompt, decoded, masks))
