"""GRIFFIN (arXiv 2404.01365, section 4): the prompt's tokens say which neurons matter for what follows.

The prompt runs dense. Each token's activations are divided by their own norm, so that every token has one vote, and a
neuron's score is the norm of its votes over the prompt's tokens:

    s_j = || ( h_tj / ||h_t||_2 )_t ||_2

Of every layer's F neurons the (1 - sparsity) F with the largest scores are kept. Where that is no whole number, layers
round it so that all of them together keep (1 - sparsity) of all neurons. The mask holds for every token that is
decoded, from the first one on.

Its code can also draw the mask: each neuron with a chance in proportion to its score, without replacement; or half of
it, the other half being the neurons with the highest scores.
"""

import math

import numpy as np
import pytest
import torch

from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.methods.griffin import Griffin
from tests.derivations import ours
from tests.derivations.plain import Plain, alike
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens


def griffin(model, prompt, sparsity, **how):
    """The masks of all layers. how: to choose them otherwise."""
    plain = Plain(model)
    plain.run(prompt)
    return alike([(seen.h / seen.h.norm(dim=1, keepdim=True)).norm(dim=0) for seen in plain.seen], sparsity, **how)


@pytest.mark.parametrize(("family", "seed", "sparsity", "execution"), in_turn(
    ["llama", "qwen2", "gemma3", "opt", "gpt2", "phi3"],
    [(0, 0.5, "masked"), (1, 0.63, "auto"), (2, 0.7, "masked")],
))  # fmt: skip
def test_griffin_is_its_formula(family, seed, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(20, seed), random_tokens(6, seed + 10)
    masks, found = griffin(model, prompt, sparsity), ours.run(model, "griffin", prompt, decoded, sparsity, execution)
    assert found.copied == (execution == "auto")
    found.check(masks, Plain(model).masked(prompt, decoded, masks))


def drawn(scores, count, seed, best):
    """The best floor(best * count) neurons, and others one by one, each with a chance in proportion to its score.

    A draw by waiting: neuron j comes after e_j / score_j, e_j exponential; the first ones to come are drawn.
    """
    waits = torch.empty(len(scores)).exponential_(generator=torch.Generator().manual_seed(seed)).double().numpy()
    chosen = list(np.argsort(-scores, kind="stable")[: math.floor(best * count + 1e-9)])
    chosen += [j for j in np.argsort(waits / scores) if j not in chosen][: count - len(chosen)]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)


@pytest.mark.parametrize("best", [0.0, 0.5, 1.0])
def test_griffin_draws_in_proportion_to_its_scores(best):
    """`sample` and `topk_sample` of its code; with best=1 nothing is drawn."""
    model, prompt, decoded = biased("llama"), random_tokens(21, seed=6), random_tokens(4, seed=9)
    masks = griffin(model, prompt, 0.5, choose=lambda s, k, layer: drawn(s.numpy(), k, 3 * 100_003 + layer, best))
    params = {"draw": "sample", "draw.best": best, "draw.seed": 3}
    found = ours.run(model, "griffin", prompt, decoded, 0.5, **params)
    found.check(masks, Plain(model).masked(prompt, decoded, masks))
    assert ours.same_masks(griffin(model, prompt, 0.5), masks) == (best == 1)


def test_a_neuron_is_drawn_as_often_as_its_score_says():
    """One of three neurons with scores 1, 2, 5: drawn with chances of 1/8, 2/8 and 5/8."""
    sums, keep, shares = torch.tensor([[1.0, 4.0, 25.0]]), torch.tensor([1]), torch.zeros(3)
    for seed in range(2000):
        shares += top_k_mask(Griffin(draw="sample", draw_seed=seed).keys(sums, keep, 0), keep)[0] / 2000
    assert shares.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)
