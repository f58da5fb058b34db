"""Rivals of one file each, beside programs of their own.

noise  the output of layer l is multiplied by 1 + 2^-9 n. n of a token of number t at place p (of the tokens that are
       real), and of element e, is the normal quantile of (leading 53 bits of z + 1/2) / 2^53, with

           z    = mix(mix(key + l C2) + e C3)        in 64 bits, mix being SplitMix64's
           key  = mix(seed + sum over the tokens up to t of mix(mix(number) + place C1))

sirius a block is a token of dense and up to k - 1 that a pruned model writes on what dense has read before; dense then
       reads prompt and text anew, keeps pruned tokens up to the first below the threshold, and adds its own likeliest.
larosa a token multiplies W Q diag(m) Q^T in place of W. It reads D^2 weights of Q a layer, and as many columns fewer.
greedy  each step of .05 goes to the matrix of a layer that then changes what the FFN writes least, over the text's last
        quarter; the last step is what is missing.
rsparse a token multiplies W diag(m) + U_r S_r V_r^T (1 - diag(m)); U_r S_r and V_r are read by every token.
"""

import statistics

import pytest
import torch

import dart_eval
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.methods.sirius import Sirius
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.derivations.test_choices import quantile, text
from tests.derivations.test_entries import LAYERS, D, F, by_hand, ffns_of, thinned
from tests.derivations.test_griffin import griffin
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import RESTLESS, generate, go_on, open_session

pytestmark = pytest.mark.slow  # each method has a golden case in the fast lane
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
    ("llama", 0), ("gpt2", 3), ("gemma3", 7),
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
    of_a_deep_layer = method.noisy(torch.ones(2, 32, 2).double(), 40)[0, :3, 1]
    keys = [mix(key + 40 * 0xD1342543DE82EF95 & WORD) for key in range(3)]
    normals = [
        statistics.NormalDist().inv_cdf((mix(k + 0xDA942042E4DD58B5 & WORD) // 2**11 + 0.5) / 2**53) for k in keys
    ]
    assert ((of_a_deep_layer - 1) * 2**9).tolist() == pytest.approx(normals)
    assert torch.equal(narrow, method.noisy(x.bfloat16().float(), 1).bfloat16())


# -- sirius ------------------------------------------------------------------------------------------------------------


def corrected(model, prompt, masks, tokens, every, threshold, ends=()):
    """A text by a model that dense corrects, and the reads of its tokens after the first, as shares of dense's.

    masks: per layer, of the pruned tokens.
    """

    def dense(ids):
        return Plain(model).run(ids)

    text, reads = [int(dense(prompt)[-1].argmax())], []

    def over():
        return len(text) == tokens or text[-1] in ends

    while not over():
        first = len(text)
        pruned = Plain(model)
        pruned.run([*prompt, *text[:-1]])
        while len(text) < first + every - 1 and not over():
            text.append(int(pruned.run([text[-1]], lambda i, h: h * masks[i])[-1].argmax()))
        written, whole = text[first:], dense([*prompt, *text])[len(prompt) + first - 1 :]
        shares = [float((row / 0.6).softmax(-1)[t]) for row, t in zip(whole, written, strict=False)]
        kept = next((i for i, share in enumerate(shares) if share < threshold), len(shares))
        taken = sum(float(m.double().sum()) for m in masks) / sum(len(m) for m in masks) * len(written) + 1
        end = kept == len(written) and over()
        text[first + kept :] = [] if end else [int(whole[kept].argmax())]
        reads += [taken / (kept + (not end))] * (kept + (not end))
    return text, reads


@pytest.mark.parametrize(("family", "every", "threshold"), [
    ("llama", 5, 0.05), ("gpt2", 4, 0.2), ("gemma3", 16, 0.1),
    ("llama", 2, 0.0), ("qwen2", 3, 1.0),
])  # fmt: skip
def test_sirius_is_what_a_pruned_model_writes_and_dense_corrects(family, every, threshold):
    model, prompt, tokens = biased(family), random_tokens(20, 4), 24
    masks = griffin(model, prompt, 0.5)
    seen = set()
    for ends in ((), (corrected(model, prompt, masks, tokens, every, threshold)[0][9],)):
        wanted, reads = corrected(model, prompt, masks, tokens, every, threshold, ends)
        with prune(model, f"sirius:every={every}:threshold={threshold}", 0.5) as session:
            end = {"eos_token_id": list(ends) or None}
            found = generate(model, torch.tensor([prompt]), tokens, **end).sequences[0, len(prompt) :].tolist()
            assert found == wanted and [float(s.read[0]) for s in session.steps] == pytest.approx(reads)
            assert session.effective_sparsity == pytest.approx(sum(1 - r for r in reads) / len(wanted))
        seen |= {*reads}
    assert len(seen) > 1 or threshold in (0.0, 1.0)


def test_a_detectors_state_goes_back_with_the_tokens(monkeypatch):
    """Blocks are fed again, each token that stayed and no other: the sequences and what was noted are the same."""
    model, prompt, blocks = biased("llama"), torch.tensor([random_tokens(20, 4)]), []
    method, kept = make("sirius", {"every": 6, "threshold": 0.08}), Sirius._kept
    method._inner = make("dart", RESTLESS)

    def noted(self, logits, block):
        blocks.append((block.tolist(), kept(self, logits, block)))
        return blocks[-1][1]

    monkeypatch.setattr(Sirius, "_kept", noted)
    with prune(model, method, 0.3) as session:
        generate(model, prompt, 40)
        found, noted_of = session.rows, (session.events, session.log.alarms, session.log.signals)
    assert {n < len(block) - 1 for block, n in blocks} == {True, False}  # some were cut, some were not
    with prune(model, method.inner, 0.3) as other, torch.no_grad():
        out = model(prompt, use_cache=True)
        for block, n in blocks:
            fed = block[: min(n + 1, len(block) - 1)]
            start = len(other.steps)
            for token in fed:
                out = go_on(model, out, torch.tensor([[token]]))
            other.rewind(len(fed), other.rows)
            with other.over(n + 1):
                out = go_on(model, out, torch.tensor([block[: n + 1]]))
            other.spread(start, n + 1, 1.0)
        assert other.remasks == found.remasks.tolist() and other.remasks[0] > 1
        assert all(torch.equal(a, b) for a, b in zip(other.rows.mask, found.mask, strict=True))
        events, alarms, signals = noted_of
        assert [e["overlap"] for e in other.events] == [e["overlap"] for e in events] and other.log.alarms == alarms
        assert torch.equal(torch.stack(other.log.signals), torch.stack(signals))


def test_what_sirius_cannot_write_is_refused():
    model, ids = biased("llama"), torch.tensor([random_tokens(9), random_tokens(9, 1)])
    head = output_head(model)
    for spec, word in (("sirius:of=dense", "prune"), ("sirius:of=sirius", "prune"), ("sirius:of=oracle", "prune"),
                       ("sirius:of=grifin", "did you mean griffin")):  # fmt: skip
        with pytest.raises(dart_eval.UserError, match=word), prune(model, spec):
            pass
    with prune(model, "sirius", 0.5) as session:
        for given, word in (({"input_ids": ids}, "one sequence"), ({"input_ids": ids[:1], "do_sample": True}, "draws")):
            with pytest.raises(dart_eval.UserError, match=word):
                model.generate(**given, max_new_tokens=3, pad_token_id=0)
        with pytest.raises(dart_eval.UserError, match="by hand"):
            model(ids)
        with pytest.raises(dart_eval.UserError, match="scores no given answers"):
            scorer(model, head, session, 1)


# -- larosa and rsparse ------------------------------------------------------------------------------------------------


def compared(model, method, sparsity, product_of, **params):
    """What the package says equals what a model does whose tokens multiply other matrices; the reads that it tells.

    product_of: layer, matrix, its weight [out, n], its input [n] -> the matrix that stands in place of the weight.
    """
    prompt, decoded = random_tokens(12, 1), random_tokens(6, 2)
    run = ours.run(model, method, prompt, decoded, sparsity, "auto", text, **params)
    wanted, _ = thinned(model, prompt, decoded, lambda i, k, w, x: torch.where(w == 0, 0, product_of(i, k, w, x) / w))
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=1e-6)
    return run.read


def columns_left(sparsity, always):
    """Per layer of x and of h, where a share of the bytes is read always."""
    return [counts([(1 - sparsity - always) * n] * LAYERS, round((1 - sparsity - always) * n * LAYERS)) for n in (D, F)]


@pytest.mark.parametrize(("family", "sparsity"), [("llama", 0.4), ("gpt2", 0.3)])
def test_larosa_reads_the_largest_inputs_along_eigenvectors(family, sparsity):
    model, last = biased(family), len(ffns_of(biased(family))[0][1]) - 1
    always = D / (F * (last + 1))
    of_x, of_h = columns_left(sparsity, always)
    rotations = []
    for x, _ in by_hand(model):
        moments = x.T @ x
        rotations.append(torch.linalg.eigh(moments + 0.01 * moments.diag().mean() * torch.eye(D))[1])

    def product_of(i, k, weight, x):
        if k == last:
            return weight * largest(x.abs(), of_h[i])
        q = rotations[i]
        return weight @ (q * largest((q.T @ x).abs(), of_x[i])) @ q.T

    read = compared(model, "larosa", sparsity, product_of)
    shares = [(last * x / D + h / F) / (last + 1) for x, h in zip(of_x, of_h, strict=True)]
    assert read == pytest.approx([sum(shares) / LAYERS + always] * 6) and abs(read[0] - 1 + sparsity) < 0.01


@pytest.mark.parametrize(("family", "sparsity", "share"), [
    ("llama", 0.5, 0.5), ("gpt2", 0.4, 0.7),
    ("qwen2", 0.6, 1.0),
])  # fmt: skip
def test_rsparse_reads_columns_and_the_largest_singular_values_of_the_rest(family, sparsity, share):
    model, last = biased(family), len(ffns_of(biased(family))[0][1]) - 1
    rank = int((1 - share) * (1 - sparsity) * D * F / (D + F))
    always, seen = rank * (D + F) / (D * F), []
    kept = [*zip(*columns_left(sparsity, always), strict=True)]
    parts, least = {}, {}
    for i, (x, h) in enumerate(by_hand(model)):
        for k, (weight, _) in enumerate(ffns_of(model)[i][1]):
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            scale = (v.T @ s.diag()).norm(dim=1)
            values, count = (h, kept[i][1]) if k == last else (x, kept[i][0])
            parts[i, k] = (u[:, :rank] @ s[:rank].diag() @ v[:rank], scale)
            least[i, k] = quantile(values.double() * scale, 1 - count / values.shape[1])

    def product_of(i, k, weight, x):
        low, scale = parts[i, k]
        mask = (x * scale).abs() > least[i, k]
        seen.append(float(mask.double().mean()))
        return weight * mask + low * ~mask

    read = compared(model, "rsparse", sparsity, product_of, **{"budget.columns": share})
    of_token = len(seen) // 6
    wanted = [sum(seen[n : n + of_token]) / of_token + always for n in range(0, len(seen), of_token)]
    assert read == pytest.approx(wanted) and len(set(read)) > 1


def test_what_reads_more_beside_columns_than_the_sparsity_leaves_is_refused():
    model = biased("llama")
    with pytest.raises(dart_eval.UserError, match=r"sparsity up to 0\.73"), open_session(model, "larosa", 0.8):
        pass
    with open_session(model, "rsparse", 0.9) as session:  # its factors are a share of what is left
        assert session.method.fixed_read == pytest.approx(0.1, abs=0.01)


# -- greedy budgets ----------------------------------------------------------------------------------------------------


def searched(model, sparsity, kept_of):
    """Per layer the columns that each matrix keeps. kept_of: matrix, weight, inputs [T, n], count -> [T, n] bool."""
    found = []
    for (x, _), (act, parts) in zip(by_hand(model), ffns_of(model), strict=True):
        x, left = x[int(0.75 * len(x)) :], [0.0] * len(parts)

        def product(k, values, left_out, parts=parts):
            weight, bias = parts[k]
            if left_out[k]:
                count = round((1 - left_out[k]) * values.shape[1])
                values = values * kept_of(k, weight, values, count)
            return values @ weight.T + (0 if bias is None else bias)

        def written(left_out, x=x, act=act, product=product):
            made = [product(k, x, left_out) for k in range(len(left_out) - 1)]
            return product(len(left_out) - 1, act(made[0]) * made[1] if len(made) > 1 else act(made[0]), left_out)

        dense = written(left)
        while (missing := sparsity * len(parts) - sum(left)) > 1e-9:
            step = min(0.05, missing)
            further = [
                [s + step * (j == k) for j, s in enumerate(left)] for k in range(len(parts)) if left[k] + step <= 1
            ]
            changes = [float((dense - written(more)).square().sum(0).sqrt().mean()) for more in further]
            left = further[changes.index(min(changes))]
        sizes = [D] * (len(parts) - 1) + [F]
        found.append([round((1 - s) * n) for s, n in zip(left, sizes, strict=True)])
    return found


@pytest.mark.parametrize(("method", "family", "sparsity"), [
    ("teal", "llama", 0.47), ("wina", "gpt2", 0.5),
    ("wina", "llama", 0.3),
    ("teal", "phi3", 0.6),
])  # fmt: skip
def test_greedy_budgets_are_those_of_a_search_with_the_least_change(method, family, sparsity):
    model = biased(family)

    def kept_of(k, weight, values, count):
        if method == "teal":
            return values.abs() > quantile(values, 1 - count / values.shape[1])
        scores = values.abs() * (weight.norm(dim=0) if k == 0 else 1.0)
        return torch.stack([largest(row, count) for row in scores])

    wanted = searched(model, sparsity, kept_of)
    with prune(model, f"{method}:allocation=greedy", sparsity, tokenizer=text) as session:
        assert session.method.counts == wanted
        assert session.method.fixed_read == pytest.approx(1 - sparsity, abs=0.02)
    assert any(len({round(n / size, 1) for n, size in zip(layer, (D, D, F)[-len(layer) :], strict=True)}) > 1
               for layer in wanted)  # fmt: skip


def test_matrices_with_budgets_of_their_own_read_columns_of_their_own():
    model, last = biased("llama"), 2
    with prune(model, "wina:allocation=greedy", 0.5, tokenizer=text) as session:
        kept, read = session.method.counts, session.method.fixed_read

    def product_of(i, k, weight, x):
        return weight * largest(x.abs() * (weight.norm(dim=0) if k == 0 else 1.0), kept[i][k])

    assert compared(model, "wina", 0.5, product_of, allocation="greedy") == pytest.approx([read] * 6)
    shares = [n / (F if k == last else D) for layer in kept for k, n in enumerate(layer)]
    assert read == pytest.approx(sum(shares) / len(shares)) and len({tuple(layer) for layer in kept}) > 1
