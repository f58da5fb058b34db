"""DART (arXiv 2601.22632), the prompt's part: which neurons are kept, and how many of each layer.

The prompt runs dense, tokens t = 1 ... N. A neuron's score is its energy, s_j = sum_t h_tj^2. How many of a layer's F
neurons are kept follows from how much its FFN changes the stream: with y_t the residual stream that enters the FFN and
z_t what the FFN adds to it, in nine steps:

    1  S = (1 - c) r,  c = mean_t cos(y_t, z_t),  r = mean_t ||z_t - y_t|| / ||y_t||       how sensitive the layer is
    2  S <- (S - min S) / (max S - min S + 1e-6), over layers
    3  R = 1 - S
    4  D = 1/4 + 3/4 x / 0.30 where x < 0.30;  7/20 + 13/20 (1 - x) / 0.15 where x > 0.85;  else 1;
       x = l / (L - 1) is the depth: early and late layers are protected
    5  P = R D
    6  p = rho L P / sum P: the share of the layer that is pruned; rho is the sparsity
    7  p <- p, no less than 0.1 and no more than 0.9
    8  ten times: what the sum of p misses of rho L is given to the layers that are not at that bound, in proportion
       to P, and step 7 is done again
    9  k = (1 - p) F neurons are kept, in whole numbers whose sum is (1 - rho) of all neurons

The paper's text as we have it gives the score, S, the two factors of step 4 and that there are bounds; the other
constants are those of its public code, and reproduce the tables that this ships (tests/pruning/test_allocation.py).
What we read otherwise: the code rounds each k by itself in step 9, and misses the sparsity; and bounds make way where
rho itself lies outside of them. Its ablations leave out r in step 1 ("no magnitude") or step 4 ("no border"). A variant
takes for z_t the stream after the FFN.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from dart_eval.pruning.methods.depth import depth_aware, normalise_sensitivity
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.models import CONFIGS, biased, random_tokens


def sensitivity(y, z, magnitude=True):
    """Step 1 for one layer. y, z: [N, D]."""
    c = cosine_similarity(y, z, dim=1).mean()
    r = ((z - y).norm(dim=1) / y.norm(dim=1)).mean()
    return float((1 - c) * (r if magnitude else 1))


def pruned_shares(s, rho, protect=True):
    """Steps 2 to 8: p of every layer from its sensitivity."""
    layers, least, most = len(s), min(0.1, rho), max(0.9, rho)
    weight = []
    for i, value in enumerate(s):
        x = i / (layers - 1) if layers > 1 else 0.5
        depth = 1.0
        if protect and x < 0.30:
            depth = 1 / 4 + 3 / 4 * x / 0.30
        elif protect and x > 0.85:
            depth = 7 / 20 + 13 / 20 * (1 - x) / 0.15
        weight.append((1 - (value - min(s)) / (max(s) - min(s) + 1e-6)) * depth)
    p = [rho * layers * w / sum(weight) for w in weight]
    for _ in range(10):
        p = [min(max(x, least), most) for x in p]
        missing = rho * layers - sum(p)
        free = [i for i in range(layers) if (p[i] < most if missing > 0 else p[i] > least)]
        if abs(missing) < 1e-6 or not free:
            break
        total = sum(weight[i] for i in free)
        for i in free:
            p[i] += missing * (weight[i] / total if total > 1e-6 else 1 / len(free))
    return [min(max(x, least), most) for x in p]


def dart_masks(model, prompt, rho, protect=True, magnitude=True, residual=False):
    """The masks of all layers after a prompt."""
    plain = Plain(model)
    plain.run(prompt)
    s = [sensitivity(seen.y, seen.y + seen.z if residual else seen.z, magnitude) for seen in plain.seen]
    sizes = [seen.h.shape[1] for seen in plain.seen]
    keep = counts(
        [(1 - p) * f for p, f in zip(pruned_shares(s, rho, protect), sizes, strict=True)], round((1 - rho) * sum(sizes))
    )
    return [largest((seen.h**2).sum(0), k) for seen, k in zip(plain.seen, keep, strict=True)]


def deep(family):
    """A tiny model of nine layers, so that there are early, late and other ones."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_hidden_layers = 9
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("family", "make", "rho", "seed"), [
    ("llama", deep, 0.3, 0), ("llama", deep, 0.5, 1), ("llama", deep, 0.7, 2), ("opt", deep, 0.5, 3),
    ("gpt2", deep, 0.7, 4), ("gemma3", biased, 0.5, 5), ("phi3", biased, 0.7, 6),
])  # fmt: skip
def test_the_prompts_masks_are_the_formula(family, make, rho, seed):
    model, prompt = make(family), random_tokens(17, seed)
    (found,) = ours.run(model, "dart", prompt, [], rho).masks
    assert ours.same_masks(found, dart_masks(model, prompt, rho))


@pytest.mark.parametrize("changed", [{"magnitude": False}, {"protect": False}, {"residual": True}])
def test_the_ablations_and_the_variant_are_the_formula(changed):
    model, prompt = deep("llama"), random_tokens(17, seed=2)
    fields = {f"allocation.{name}": value for name, value in changed.items()}
    if "residual" in changed:
        fields = {"allocation.sensitivity": "residual"}
    (found,) = ours.run(model, "dart", prompt, [], **fields).masks
    (usual,) = ours.run(model, "dart", prompt, []).masks
    assert ours.same_masks(found, dart_masks(model, prompt, 0.5, **changed))
    assert not ours.same_masks(found, usual)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=40), st.floats(0, 0.99), st.booleans())
def test_the_shares_of_any_sensitivities_are_the_formula(s, rho, protect):
    if max(s) - min(s) < 1e-3:  # where all P are 0 the package shares evenly, and this divides by 0
        s[-1] += 1
    found = depth_aware(normalise_sensitivity(s), rho, protect)
    assert found == pytest.approx([1 - p for p in pruned_shares(s, rho, protect)], abs=1e-9)
