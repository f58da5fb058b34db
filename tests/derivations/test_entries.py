"""Methods that leave out other things than neurons: teal, wina and rounding, on the three matrices of an FFN.

Gate and up [F, D] multiply x, down [D, F] multiplies h. At sparsity s a token keeps of n inputs (D of x, F of h) over
all L layers round((1 - s) n L), each layer its share, rounded down, the rest one by one.

teal   of a text of n tokens the threshold of a layer is the quantile s of |x| over all of them, and of |h| another one
       (cut to 10 bits of mantissa). A token keeps the inputs with a larger magnitude.
wina   a token keeps the k inputs with the largest magnitude; of gate's (a plain FFN's up's), the largest |x_i| times
       the L2 norm of column i. `weigh=all`: of all three.
rounding of every weight what `--ffn-bits` would round it to is read: prompts run on the weights as they are.

Read is what is kept of the three matrices, all alike in size.
"""

import contextlib

import pytest
import torch

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import Session
from dart_eval.util.bits import parse
from tests.derivations import ours
from tests.derivations.plain import Plain, counts, largest
from tests.derivations.test_choices import TEXT, quantile, text
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens
from tests.helpers.sessions import PLAIN, bits, open_session, same

D, F, LAYERS = 32, 40, 3
FAMILIES = ["llama", "qwen2", "phi3", "gpt2", "opt"]


def ffns_of(model):
    """Per layer: gate, up and down as functions with their weights; the activation; matrices as [out, in]."""
    found = []
    kind = model.config.model_type
    layers = {"gpt2": lambda: model.transformer.h, "opt": lambda: model.model.decoder.layers}
    for layer in layers.get(kind, lambda: model.model.layers)():
        if kind == "gpt2":
            parts = [(m.weight.T, m.bias) for m in (layer.mlp.c_fc, layer.mlp.c_proj)]
            found.append((layer.mlp.act, parts))
        elif kind == "opt":
            found.append((layer.activation_fn, [(m.weight, m.bias) for m in (layer.fc1, layer.fc2)]))
        elif kind == "phi3":
            both = layer.mlp.gate_up_proj
            halves = [(w, None) for w in both.weight.chunk(2)]
            found.append((layer.mlp.activation_fn, [*halves, (layer.mlp.down_proj.weight, layer.mlp.down_proj.bias)]))
        else:
            made = [(m.weight, m.bias) for m in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)]
            found.append((layer.mlp.act_fn, made))
    return found


def thinned(model, prompt, decoded, kept_of, of_prompt=contextlib.nullcontext()):
    """Log-probabilities of what follows, and the share of inputs kept by each token.

    kept_of: layer, matrix, its weight, its input [n] -> factors of 0 and 1 on its weights, [out, n] or [n].
    of_prompt: context in which the prompt runs.
    """
    plain, parts, shares, found = Plain(model), ffns_of(model), [], []
    with of_prompt:
        rows = [plain.run(prompt)]

    def product(i, k, value):
        weight, bias = parts[i][1][k]
        kept = kept_of(i, k, weight, value).to(weight.dtype)
        shares.append(float(kept.mean()))
        out = (weight * kept) @ value
        return out if bias is None else out + bias

    def written(i):
        act, matrices = parts[i]
        made = [product(i, k, plain.seen[i].x[0]) for k in range(len(matrices) - 1)]
        h = act(made[0]) * made[1] if len(made) > 1 else act(made[0])
        return product(i, len(matrices) - 1, h)

    handles = [
        layer.down.register_forward_hook(
            lambda _m, _a, out, i=i: written(i).view(out.shape) if plain.seen[i].x.shape[0] == 1 else None
        )
        for i, layer in enumerate(plain.layers)
    ]
    for token in decoded:
        shares.clear()
        rows.append(plain.run([token]))
        found.append(sum(shares) / len(shares))
    for handle in handles:
        handle.remove()
    return torch.cat(rows), found


def check(model, method, sparsity, kept_of, read, atol=1e-9, **params):
    prompt, decoded = random_tokens(12, 1), random_tokens(6, 2)
    before = bits(model)
    run = ours.run(model, method, prompt, decoded, sparsity, "auto", text, **params)
    assert same(model, before)
    wanted, found = thinned(model, prompt, decoded, kept_of)
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=atol)
    assert run.read == pytest.approx(found if read is None else [read] * 6)
    return run


def kept_counts(sparsity):
    """Per layer, of x and of h."""
    of_x, of_h = (counts([(1 - sparsity) * n] * LAYERS, round((1 - sparsity) * n * LAYERS)) for n in (D, F))
    return [*zip(of_x, of_h, strict=True)]


def by_hand(model):
    """Per layer x and h of the tokens of the text."""
    plain = Plain(model)
    plain.run(TEXT)
    return [(seen.x, seen.h) for seen in plain.seen]


EACH = [*zip(FAMILIES, [0.5, 0.7, 0.3, 0.6, 0.4], strict=True)]
FEW = [pytest.param(*case, marks=pytest.mark.slow if i % 3 else []) for i, case in enumerate(EACH)]  # llama and gpt2


@pytest.mark.parametrize(("family", "sparsity"), FEW)
def test_teal_reads_columns_of_inputs_above_the_threshold(family, sparsity):
    model = biased(family)
    last = 1 if family in PLAIN else 2
    kept = kept_counts(sparsity)
    least = [
        [quantile(v, 1 - k / n) for v, k, n in zip(both, layer, (D, F), strict=True)]
        for both, layer in zip(by_hand(model), kept, strict=True)
    ]
    run = check(model, "teal", sparsity, lambda i, k, _w, x: x.abs() > least[i][k == last], None)
    assert len(set(run.read)) > 1 and abs(sum(run.read) / 6 - (1 - sparsity)) < 0.15


@pytest.mark.parametrize(("family", "sparsity", "weigh"), in_turn(EACH, ["gate", "all"]))
def test_wina_reads_columns_with_the_largest_inputs_times_norms(family, sparsity, weigh):
    model = biased(family)
    last = 1 if family in PLAIN else 2
    kept = kept_counts(sparsity)

    def kept_of(i, k, weight, x):
        norms = weight.float().square().sum(0).sqrt() if weigh == "all" or k == 0 else 1.0
        return largest(x.abs() * norms, kept[i][k == last])

    shares = [(last * of_x / D + of_h / F) / (last + 1) for of_x, of_h in kept]
    run = check(model, "wina", sparsity, kept_of, sum(shares) / LAYERS, **{"entries.weigh": weigh})
    assert run.read == pytest.approx([1 - sparsity] * 6, abs=0.01)


@pytest.mark.parametrize(("text", "bits", "family"), [
    ("4", 4 + 16 / 32, "llama"), ("q4_k", 4 + (12 + 32) / 32, "llama"), ("q3_k", 3 + (12 + 16) / 32, "llama"),
    ("4", 4 + 16 / 32, "gpt2"),
])  # fmt: skip
def test_rounding_is_that_of_decoded_tokens_alone(text, bits, family):
    """A row of 32 weights (40 of down) has one or two groups, and a factor or two of its own."""
    model, rows = biased(family), {}
    with dart_eval.rounded_ffns(model, text):
        for f in find_ffns(model):
            for m in f.projections:
                rows[m] = m.weight.detach().clone()
    made = {m.weight.data_ptr(): values for m, values in rows.items()}
    matrices = [w.shape[1] for _, parts in ffns_of(model) for w, _ in parts]
    of = {D: bits, F: parse(text).weight_bits(F)}

    def kept_of(_i, _k, weight, _x):
        values = made[weight.data_ptr()]
        return torch.where(weight == 0, 0, (values if values.shape == weight.shape else values.T) / weight)

    check(model, "rounding", 0.0, kept_of, sum(of[n] for n in matrices) / len(matrices) / 16, **{"entries.bits": text})


def test_what_lacks_weights_or_a_text_is_refused():
    model = biased("llama")
    with dart_eval.rounded_ffns(model, 4), pytest.raises(dart_eval.UserError, match="--ffn-bits"):
        make("rounding").check(find_ffns(model), 0.0)
    for name, params in (("teal", {}), ("cats", {"choice.threshold": "calibrated"})):
        with pytest.raises(dart_eval.UserError, match="calibration"):
            Session(model, make(name, params), 0.5)


def test_bytes_beside_the_model():
    """Of wina the norms of gate's columns, of teal two thresholds a layer, of rounding the values of every weight."""
    for method, wanted in (("teal", 3 * 2 * 4), ("wina", 3 * D * 4), ("rounding", 3 * 3 * D * F * 8)):
        with open_session(biased("llama"), method, 0.5) as session:
            assert (session.memory, session.state_bytes) == (wanted, 0)
