"""GRIFFIN's draws, and layers that stay dense.

A layer has F neurons with activations h_tj and a down projection W (column j is what neuron j writes); (1 - sparsity) F
are kept of each, in whole numbers as in test_griffin.

griffin    Its code can also draw the mask: each neuron with a chance in proportion to its score (GRIFFIN's is a root),
           without replacement; or half of it, the other half being the neurons with the highest scores.
ends       The first a and the last b of L layers are dense, the others keep 1 - sparsity L / (L - a - b).

All is computed with numpy.
"""

import math

import numpy as np
import pytest
import torch

from dart_eval.pruning.masks.draws import Sample
from dart_eval.pruning.masks.scores import Activation
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.models import biased, random_tokens


def prompt_of(model, prompt):
    """Per layer h [N, F] of the prompt and W [D, F]."""
    plain = Plain(model)
    plain.run(prompt)
    down = [layer.down.weight for layer in plain.layers]
    turned = model.config.model_type == "gpt2"
    return [seen.h.numpy() for seen in plain.seen], [(w.T if turned else w).detach().numpy() for w in down]


def masks_of(scores, sparsity, densities=None):
    """The masks of all layers. scores: L x [F]."""
    sizes = [len(s) for s in scores]
    shares = densities or [1 - sparsity] * len(sizes)
    keep = counts([d * f for d, f in zip(shares, sizes, strict=True)], round((1 - sparsity) * sum(sizes)))
    return [largest(torch.tensor(s), k) for s, k in zip(scores, keep, strict=True)]


def griffin(h):
    return ((h / np.linalg.norm(h, axis=1, keepdims=True)) ** 2).sum(0)


def check(model, method, masks, prompt, sparsity, **params):
    """The package's masks, and what a token says under them."""
    decoded = random_tokens(4, seed=9)
    found = ours.run(model, method, prompt, decoded, sparsity, **params)
    assert all(ours.same_masks(now, masks) for now in found.masks)
    plain = Plain(model)
    rows = [plain.run(prompt), *(plain.run([token], lambda layer, h: h * masks[layer]) for token in decoded)]
    assert torch.allclose(found.logprobs, torch.cat(rows), rtol=0, atol=1e-9)


def drawn(scores, count, seed, best):
    """The best floor(best * count) neurons, and others one by one, each with a chance in proportion to its score.

    A draw by waiting: neuron j comes after e_j / score_j, e_j exponential; the first ones to come are drawn.
    """
    waits = torch.empty(len(scores)).exponential_(generator=torch.Generator().manual_seed(seed)).double().numpy()
    chosen = list(np.argsort(-scores, kind="stable")[: math.floor(best * count + 1e-9)])
    chosen += [j for j in np.argsort(waits / scores) if j not in chosen][: count - len(chosen)]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)


@pytest.mark.parametrize("best", [0.0, 0.5, 1.0])
def test_griffin_draws_in_proportion_to_the_root_of_its_sums(best):
    """`sample` and `topk_sample` of its code; with best=1 nothing is drawn."""
    model, prompt = biased("llama"), random_tokens(21, seed=6)
    h, _ = prompt_of(model, prompt)
    masks = [drawn(np.sqrt(griffin(x)), 20, 3 * 100_003 + i, best) for i, x in enumerate(h)]
    check(model, "griffin", masks, prompt, 0.5, **{"draw": "sample", "draw.best": best, "draw.seed": 3})
    same = masks_of([griffin(x) for x in h], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(masks, same, strict=True)) is (best == 1)


def test_a_neuron_is_drawn_as_often_as_its_score_says():
    """One of three neurons with scores 1, 2, 5: drawn with chances of 1/8, 2/8 and 5/8."""
    sums, keep, score = torch.tensor([[1.0, 4.0, 25.0]]), torch.tensor([1]), Activation()
    found = sum(Sample(seed=seed).draw(sums, keep, 0, score)[0].float() for seed in range(2000)) / 2000
    assert found.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)
