"""Rivals that make a mask from the prompt's tokens t = 1 ... N: coreinfer, glass, probe, and griffin's draws.

A layer has F neurons with activations h_tj and a down projection W (column j is what neuron j writes); (1 - sparsity) F
are kept of each, in whole numbers as in test_griffin.

coreinfer  (arXiv 2410.18311) Each token has as many votes as 0.2 of its positive activations, rounded down: for its
           largest h_tj, signed. A neuron's score is the number of its votes.
glass      (after the abstract of arXiv 2508.14302) Neurons are ranked by GRIFFIN's score on the prompt, and on a
           calibration text; the score is the weighted mean of the two ranks.
probe      (arXiv 2502.15618) p_j is the mean of h_tj^2 over the prompt's tokens, or over every second one from the
           first on, q_j the same over a calibration text; (p^2 + q^2) / (p + q) * sqrt(sum_i W_ij^4), 0 if p = q = 0.
griffin    Its code can also draw the mask: each neuron with a chance in proportion to its score (GRIFFIN's is a root),
           without replacement; or half of it, the other half being the neurons with the highest scores.
ends       The first a and the last b of L layers are dense, the others keep 1 - sparsity L / (L - a - b).

The calibration text and its pieces are those of test_wanda_sp. All is computed with numpy.
"""

import math

import numpy as np
import pytest
import torch

from dart_eval.pruning.masks.allocations import Ends
from dart_eval.pruning.masks.draws import Sample
from dart_eval.pruning.masks.prompt_scores import Votes
from dart_eval.pruning.masks.scores import Activation
from dart_eval.util.errors import UserError
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.derivations.test_wanda_sp import OneText, passages
from tests.helpers.models import biased, random_tokens


def prompt_of(model, prompt):
    """Per layer h [N, F] of the prompt and W [D, F]."""
    plain = Plain(model)
    plain.run(prompt)
    down = [layer.down.weight for layer in plain.layers]
    turned = model.config.model_type == "gpt2"
    return [seen.h.numpy() for seen in plain.seen], [(w.T if turned else w).detach().numpy() for w in down]


def text_of(model):
    """Per layer h [N, F] of the calibration text."""
    return [np.concatenate(pieces) for pieces in passages(model)]


def masks_of(scores, sparsity, densities=None):
    """The masks of all layers. scores: L x [F]."""
    sizes = [len(s) for s in scores]
    shares = densities or [1 - sparsity] * len(sizes)
    keep = counts([d * f for d, f in zip(shares, sizes, strict=True)], round((1 - sparsity) * sum(sizes)))
    return [largest(torch.tensor(s), k) for s, k in zip(scores, keep, strict=True)]


def votes(h, share):
    found = np.zeros(h.shape[1])
    for token in h:
        best = sorted(range(len(token)), key=lambda j: (-token[j], j))
        found[best[: math.floor(share * int((token > 0).sum()) + 1e-9)]] += 1
    return found


def griffin(h):
    return ((h / np.linalg.norm(h, axis=1, keepdims=True)) ** 2).sum(0)


def ranks(scores):
    """1 for the smallest."""
    found = np.empty(len(scores))
    found[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    return found


def fused(p, q, w):
    return (p**2 + q**2) / np.maximum(p + q, 1e-300) * np.sqrt((w**4).sum(0))


def check(model, method, masks, prompt, sparsity, **params):
    """The package's masks, and what a token says under them."""
    decoded = random_tokens(4, seed=9)
    found = ours.run(model, method, prompt, decoded, sparsity, tokenizer=OneText(), **params)
    assert all(ours.same_masks(now, masks) for now in found.masks)
    plain = Plain(model)
    rows = [plain.run(prompt), *(plain.run([token], lambda layer, h: h * masks[layer]) for token in decoded)]
    assert torch.allclose(found.logprobs, torch.cat(rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "sparsity", "share"), [
    ("llama", 0.5, 0.2), ("gemma3", 0.63, 0.7), ("gpt2", 0.5, 0.2), ("opt", 0.7, 0.7),
])  # fmt: skip
def test_coreinfer_is_its_formula(family, sparsity, share):
    model, prompt = biased(family), random_tokens(40, seed=1)
    h, _ = prompt_of(model, prompt)
    check(
        model, "coreinfer", masks_of([votes(x, share) for x in h], sparsity), prompt, sparsity, **{"score.share": share}
    )


@pytest.mark.parametrize(("family", "local"), [("llama", 0.5), ("gpt2", 0.25)])
def test_glass_is_its_formula(family, local):
    model, prompt = biased(family), random_tokens(20, seed=2)
    h, _ = prompt_of(model, prompt)
    mixed = [
        local * ranks(griffin(x))
        + (1 - local) * ranks(griffin(y))
        + 1e-9 * np.arange(x.shape[1], 0, -1)  # equal: first
        for x, y in zip(h, text_of(model), strict=True)
    ]
    check(model, "glass", masks_of(mixed, 0.5), prompt, 0.5, **{"score.local": local})


@pytest.mark.parametrize(("family", "share"), [("llama", 1.0), ("gemma3", 0.5), ("opt", 0.5)])
def test_probe_is_its_formula(family, share):
    model, prompt = biased(family), random_tokens(21, seed=4)
    h, w = prompt_of(model, prompt)
    step = round(1 / share)
    scores = [fused((x[::step] ** 2).mean(0), (y**2).mean(0), v) for x, y, v in zip(h, text_of(model), w, strict=True)]
    check(model, "probe", masks_of(scores, 0.63), prompt, 0.63, **{"score.share": share})


def test_probe_of_all_tokens_without_history_is_the_score_of_all_tokens():
    model, prompt = biased("llama"), random_tokens(21, seed=4)
    h, w = prompt_of(model, prompt)
    scores = [(x**2).sum(0) * np.linalg.norm(v**2, axis=0) for x, v in zip(h, w, strict=True)]
    check(model, "probe", masks_of(scores, 0.5), prompt, 0.5, **{"score.history": False})


@pytest.mark.parametrize(("first", "last", "density"), [(1, 1, 0.1), (1, 0, 0.55), (0, 0, 0.7), (0, 1, 0.55)])
def test_layers_at_both_ends_stay_dense(first, last, density):
    """Three layers at sparsity 0.3: what is pruned of the others is 0.9 / (3 - first - last)."""
    model, prompt = biased("llama"), random_tokens(21, seed=5)
    h, _ = prompt_of(model, prompt)
    densities = [1.0] * first + [density] * (3 - first - last) + [1.0] * last
    masks = masks_of([votes(x, 0.2) for x in h], 0.3, densities)
    ends = {"allocation": "ends", "allocation.first": first, "allocation.last": last}
    check(model, "coreinfer", masks, prompt, 0.3, **ends)
    assert Ends(first=first, last=last).densities(0.3, [20] * 3, None, slice(None)) == pytest.approx(densities)
    with pytest.raises(
        UserError, match=r"allocation=ends prunes only 1 of 3 layers, too few.*use a sparsity up to 0.33"
    ):
        ours.run(model, "coreinfer", prompt, [], 0.5, allocation="ends")


def test_votes_do_not_depend_on_the_pieces_that_a_context_comes_in():
    torch.manual_seed(0)
    h, weight, score = torch.randn(2, 31, 50).relu().to(torch.bfloat16).float(), torch.ones(2, 31), Votes()
    weight[0, :7] = 0
    pieces = [score.observe(h[:, a:b], None, weight[:, a:b]) for a, b in ((0, 1), (1, 12), (12, 31))]
    whole = score.observe(h, None, weight)
    assert whole.dtype == torch.float32 and torch.equal(sum(pieces), whole)
    assert np.array_equal(whole[0].numpy(), votes(h[0, 7:].numpy(), 0.2))


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
