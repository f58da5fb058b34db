"""GRIFFIN (arXiv 2404.01365, section 4): the prompt's tokens say which neurons matter for what follows.

The prompt runs dense. Each token's activations are divided by their own norm, so that every token has one vote, and a
neuron's score is the norm of its votes over the prompt's tokens:

    s_j = || ( h_tj / ||h_t||_2 )_t ||_2

Of every layer's F neurons the (1 - sparsity) F with the largest scores are kept. Where that is no whole number, layers
round it so that all of them together keep (1 - sparsity) of all neurons. The mask holds for every token that is
decoded, from the first one on.
"""

import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens


def griffin(model, prompt, decoded, sparsity):
    """The masks of all layers, and the log-probabilities of what follows each token of prompt and decoded."""
    plain = Plain(model)
    rows = [plain.run(prompt)]
    scores = [(seen.h / seen.h.norm(dim=1, keepdim=True)).norm(dim=0) for seen in plain.seen]
    sizes = [len(s) for s in scores]
    keep = counts([(1 - sparsity) * f for f in sizes], round((1 - sparsity) * sum(sizes)))
    masks = [largest(s, k) for s, k in zip(scores, keep, strict=True)]
    rows += [plain.run([token], lambda layer, h: h * masks[layer]) for token in decoded]
    return masks, torch.cat(rows)


@pytest.mark.parametrize(("family", "seed", "sparsity", "execution"), in_turn(
    ["llama", "qwen2", "gemma3", "opt", "gpt2", "phi3"],
    [(0, 0.5, "masked"), (1, 0.63, "copied"), (2, 0.7, "masked")],
))  # fmt: skip
def test_griffin_is_its_formula(family, seed, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(20, seed), random_tokens(6, seed + 10)
    masks, logprobs = griffin(model, prompt, decoded, sparsity)
    found = ours.run(model, "griffin", prompt, decoded, sparsity, execution=execution)
    assert all(ours.same_masks(now, masks) for now in found.masks)
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-9)
