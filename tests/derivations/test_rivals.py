"""Rivals of one file each, beside programs of their own.

noise  the output of layer l is multiplied by 1 + 2^-9 n. n of a token of number t at place p (of the tokens that are
       real), and of element e, is the normal quantile of (leading 53 bits of z + 1/2) / 2^53, with

           z    = mix(mix(key + l C2) + e C3)        in 64 bits, mix being SplitMix64's
           key  = mix(seed + sum over the tokens up to t of mix(mix(number) + place C1))
"""

import statistics

import pytest
import torch

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from tests.derivations import ours
from tests.derivations.plain import Plain
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import generate, open_session

WORD = (1 << 64) - 1


# -- noise -------------------------------------------------------------------------------------------------------------


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def noise(tokens, layer, width, seed):
    """[T, width] fp64, of the tokens of a sequence from its first one on."""
    rows, total = [], 0
    for place, token in enumerate(tokens):
        total += mix(mix(token) + place * 0x9E3779B97F4A7C15 & WORD)
        key = mix(mix(total + seed & WORD) + layer * 0xD1342543DE82EF95 & WORD)
        bits = (mix(key + element * 0xDA942042E4DD58B5 & WORD) >> 11 for element in range(width))
        rows.append([statistics.NormalDist().inv_cdf((b + 0.5) / 2**53) for b in bits])
    return torch.tensor(rows, dtype=torch.float64)


def noisy(model, tokens, prompt, seed):
    """Log-probabilities of a prompt and what follows it token by token, with noise after every layer."""
    plain, done, handles = Plain(model), 0, []
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    for number, layer in enumerate(layers):

        def after(_module, _args, out, number=number):
            x = out[0] if isinstance(out, tuple) else out
            grown = x * (1 + 2**-9 * noise(tokens[: done + x.shape[1]], number, x.shape[2], seed)[done:])
            return (grown, *out[1:]) if isinstance(out, tuple) else grown

        handles.append(layer.register_forward_hook(after))
    rows = []
    for part in [tokens[:prompt], *([t] for t in tokens[prompt:])]:
        rows.append(plain.run(list(part)))
        done += len(part)
    for handle in handles:
        handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(("family", "seed"), [
    ("llama", 0), pytest.param("gpt2", 3, marks=pytest.mark.slow), pytest.param("gemma3", 7, marks=pytest.mark.slow),
])  # fmt: skip
def test_noise_is_one_rounding_of_every_layer_by_the_tokens_so_far(family, seed):
    model, tokens = biased(family), random_tokens(17, 1)
    run = ours.run(model, "noise", tokens[:12], tokens[12:], 0.0, "auto", None, **{"noise.seed": seed})
    wanted = noisy(model, tokens, 12, seed)
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=1e-8) and run.read == [1.0] * 5
    dense = Plain(model).run(list(tokens))
    assert 1e-3 < (run.logprobs - dense).abs().max() < 1


def test_noise_is_the_same_in_any_batch_and_beside_a_shared_prefix():
    """Contexts of many lengths share a prefix of which shorter ones compute a part again; then each runs alone."""
    model, prefix = biased("llama"), random_tokens(40, 3)
    requests = [Request((*prefix[:cut], *random_tokens(n, 5 + n)), random_tokens(m, 50 + m))
                for cut, n, m in ((40, 1, 3), (40, 2, 1), (40, 9, 4), (38, 20, 2), (0, 7, 2), (0, 0, 1))
                if cut + n]  # fmt: skip
    head = output_head(model)
    with open_session(model, "noise", 0.0) as session:
        alone = [scorer(model, head, session, 1, share_prefix=False).score([r])[0].logprob for r in requests]
        for size in (1, 2, 8):
            found = [s.logprob for s in scorer(model, head, session, size).score(requests)]
            assert found == pytest.approx(alone, abs=1e-9)
        ids = torch.tensor([(0,) * 9 + prefix[:11], prefix[20:]])
        mask = torch.tensor([[0] * 9 + [1] * 11, [1] * 20])
        together = generate(model, ids, 6, mask).sequences[0, 20:]
        assert torch.equal(together, generate(model, ids[:1, 9:], 6).sequences[0, 11:])
    dense = scorer(model, head, type(session)(), 8).score(requests)
    assert all(abs(a - b.logprob) > 1e-5 for a, b in zip(alone, dense, strict=True))


def test_noise_has_the_size_of_a_rounding_and_is_rounded_once():
    model = biased("llama").to(torch.bfloat16)
    with open_session(model, "noise", 0.0) as session:
        method = session.method
        method._keys = torch.arange(64).view(2, 32)
        x = torch.linspace(0.5, 3, 64 * 500).view(2, 32, 500)
        wide, narrow = method.noisy(x, 1), method.noisy(x.bfloat16(), 1)
    errors = ((wide / x).double() - 1) * 2**9
    assert float(errors.mean()) == pytest.approx(0, abs=0.02) and float(errors.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(narrow, method.noisy(x.bfloat16().float(), 1).bfloat16())
