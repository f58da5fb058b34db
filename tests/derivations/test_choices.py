"""What each token computes of an FFN, where tokens choose: cats, m-countdown, oracle-token, top-p, and inside a mask.

A gated FFN has a = act(gate x), u = up x, h = a * u and an output down h; a plain one has h = act(up x). All L layers
together have N neurons, of which a mask alone would keep K = (1 - sparsity) N. Three matrices (two, of a plain FFN)
have 3 N rows and columns; a token may read 3 K of them, as many in every layer, in whole numbers that sum up to that.

cats          CATS (arXiv 2404.08763), with a count in place of its threshold: gate is read for all N neurons. What is
              left is for up and down alike: P = (3 K - N) / 2 neurons have the largest |a|; their rows of up and
              columns of down are read. (If 3 K - N is odd, one more row of up: down leaves out the least |h|.)
m-countdown   M-COUNTDOWN (arXiv 2505.17701), with a count in place of its threshold: the same with u in place of a.
oracle-token  the K neurons with the largest |h|, as if h were known.
top-p         the fewest neurons whose |h| sum up to the share p of all, as if h were known. What it reads is counted.

A plain FFN's up is all that is before h: it is read whole, and P = 2 K - N columns of down have the largest |h|.

Inside a mask of M neurons, a multiple of K (no more than there are, and of as many that the rest is for two alike),
"all N" is "the mask's M", and nothing outside the mask is taken. The mask here is GRIFFIN's (test_griffin).
"""

import math

import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import PLAIN, fitting

WHOLE = {"cats": "a", "m-countdown": "u", "oracle-token": "", "gate": "a", "up": "u", "hidden": ""}


def budget(neurons, layers, sparsity, matrices, whole, ratio=None):
    """Per layer: neurons of the mask, those that are taken, those that are written."""
    exact = (1 - sparsity) * neurons
    k = round(exact)
    wide = neurons if ratio is None else min(ratio * exact, neurons)
    m = round(wide if ratio is None else min(ratio * k, neurons))
    if whole and matrices == 3 and ratio is not None:
        m -= (3 * k - m) % 2
    rest = matrices * k - (m if whole else 0)
    alike = matrices - 1 if whole else matrices  # matrices of which what is taken is read
    taken = math.ceil(rest / alike)
    written = rest - (alike - 1) * taken
    share = (matrices * exact - (wide if whole else 0)) / alike
    wanted = ((wide, m), (share, taken), (share, written))
    return [*zip(*(counts([w / layers] * layers, total) for w, total in wanted), strict=True)]


def chosen(model, prompt, decoded, sparsity, by, ratio=None):
    """Log-probabilities of what follows each token. by: what a token looks at, `a`, `u` or nothing but h."""
    plain = Plain(model)
    rows = [plain.run(prompt)]
    votes = [(seen.h / seen.h.norm(dim=1, keepdim=True)).square().sum(0) for seen in plain.seen]
    gated, layers = plain.seen[0].u is not None, len(plain.seen)
    count = budget(sum(len(v) for v in votes), layers, sparsity, 3 if gated else 2, bool(by), ratio)
    masks = [largest(v, m) for v, (m, _, _) in zip(votes, count, strict=True)]

    def change(i, h):
        look = getattr(plain.seen[i], by) if by and gated else h
        kept = largest(look[0].abs().masked_fill(~masks[i], -1), count[i][1])
        return h * largest(h[0].abs().masked_fill(~kept, -1), count[i][2])

    rows += [plain.run([token], change) for token in decoded]
    return torch.cat(rows)


@pytest.mark.parametrize(("method", "family", "seed", "sparsity", "execution"), in_turn(
    ["cats", "m-countdown", "oracle-token"],
    [("llama", 0, 0.5, "masked"), ("llama", 1, 0.63, "copied"), ("qwen2", 2, 0.3, "masked"),
     ("gemma3", 3, 0.47, "copied"), ("phi3", 4, 0.6, "masked"), ("gpt2", 5, 0.5, "masked"), ("opt", 6, 0.37, "auto")],
))  # fmt: skip
def test_a_token_computes_what_it_needs_most(method, family, seed, sparsity, execution):
    model, prompt, decoded = biased(family), random_tokens(12, seed), random_tokens(6, seed + 10)
    sparsity = fitting(method, family, sparsity)
    found = ours.run(model, method, prompt, decoded, sparsity, execution=execution)
    logprobs = chosen(model, prompt, decoded, sparsity, WHOLE[method])
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-9)
    assert found.read == [pytest.approx(round((1 - sparsity) * 120) / 120, abs=1e-15)] * 6
    assert all(bool(m.all()) for masks in found.masks for m in masks)


@pytest.mark.parametrize(("choice", "family", "seed", "sparsity", "ratio", "execution"), in_turn(
    ["gate", "up", "hidden"],
    [("llama", 0, 0.5, 1.5, "masked"), ("llama", 1, 0.7, 1.6, "copied"), ("gemma3", 2, 0.63, 1.3, "copied"),
     ("phi3", 3, 0.9, 2.0, "masked"), ("gpt2", 4, 0.63, 1.6, "copied"), ("opt", 5, 0.8, 1.2, "masked")],
))  # fmt: skip
def test_inside_a_mask_it_computes_what_it_needs_most_of_that(choice, family, seed, sparsity, ratio, execution):
    model, prompt, decoded = biased(family), random_tokens(15, seed), random_tokens(6, seed + 10)
    inside = {"choice": choice, "choice.mask_ratio": ratio}
    found = ours.run(model, "griffin", prompt, decoded, sparsity, execution=execution, **inside)
    logprobs = chosen(model, prompt, decoded, sparsity, WHOLE[choice], ratio)
    assert torch.allclose(found.logprobs, logprobs, rtol=0, atol=1e-9)
    assert found.read == [pytest.approx(round((1 - sparsity) * 120) / 120, abs=1e-15)] * 6


def fewest(h, p):
    """[F] bool: neurons in the order of |h|, up to the first with which they have the share p of the sum."""
    order = h.abs().argsort(descending=True, stable=True)
    kept, total = torch.zeros(len(h), dtype=torch.bool), 0.0
    for j in order:
        if total >= p * float(h.abs().sum()):
            break
        kept[j], total = True, total + float(h[j].abs())
    return kept


@pytest.mark.parametrize(("family", "p"), in_turn(["llama", "gemma3", *PLAIN], [0.3, 0.8, 0.97]))
def test_a_token_computes_the_fewest_neurons_with_the_share_p(family, p):
    model, prompt, decoded = biased(family), random_tokens(12, seed=1), random_tokens(5, seed=2)
    found = ours.run(model, "top-p", prompt, decoded, execution="masked", **{"choice.p": p})
    plain, read = Plain(model), []
    rows, kept = [plain.run(prompt)], []

    def change(i, h):
        kept.append(fewest(h[0].float(), p))
        return h * kept[-1]

    for token in decoded:
        kept.clear()
        rows.append(plain.run([token], change))
        read.append(sum(int(k.sum()) for k in kept) / 120)
    assert torch.allclose(found.logprobs, torch.cat(rows), rtol=0, atol=1e-9)
    assert found.read == pytest.approx(read, abs=1e-12)
    assert 0 < min(read) <= max(read) < 1 and len(set(read)) > 1
