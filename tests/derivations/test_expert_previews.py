"""Previews of experts, by loops over tokens, experts and matrices."""

import pytest
import torch

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.choices.images import Copy, FirstBits
from dart_eval.util.bits import parse
from dart_eval.weights.rounding import Served, rounded
from tests.helpers.sessions import bits, generate, open_session, prompts_of, same
from tests.matrix.types import tiny

LAYER = 1


def silu(x):
    return x * torch.sigmoid(x)


def halves(made, name):
    return (made[..., ::2], made[..., 1::2]) if name == "gpt_oss" else made.chunk(2, -1)


def act(gate, name):
    """What the gate contributes: of gpt-oss twice, since up counts as (up + 1) / 2 beside it."""
    return 2 * gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0)) if name == "gpt_oss" else silu(gate)


def rest(up, name):
    return (up.clamp(-7.0, 7.0) + 1) / 2 if name == "gpt_oss" else up


class Layer:
    """The experts of one layer: gate, up and down of all, rows of one expert after another, as [out, in]."""

    def __init__(self, model, name):
        self.name, experts = name, model.model.layers[LAYER].mlp.experts
        turned = [(w.T, d.T) if name == "gpt_oss" else (w, d) for w, d in zip(
            experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True)]  # fmt: skip
        pairs = [[part.T for part in halves(w.T, name)] for w, _ in turned]
        self.inner, self.count = len(pairs[0][0]), len(pairs)
        biases = getattr(experts, "gate_up_proj_bias", None)
        self.biases = [torch.zeros(self.count * self.inner)] * 2
        if biases is not None:
            self.biases = [torch.cat([halves(b, name)[i] for b in biases.detach()]) for i in (0, 1)]
        self.inputs = [torch.cat([pair[i] for pair in pairs]) for i in (0, 1)]
        self.down = torch.cat([d for _, d in turned])
        self.width = len(turned[0][1])
        self.down_bias = getattr(experts, "down_proj_bias", torch.zeros(self.count, self.width)).detach()

    def rows(self, expert):
        return slice(expert * self.inner, (expert + 1) * self.inner)

    def columns(self, expert):
        return slice(expert * self.width, (expert + 1) * self.width)


def by_hand(layer, image, serve, x, index, weights, counts, known=0.2):
    """What one token's experts write: exact neurons, those that write as the preview has them, and biases."""
    served, down = [serve(m) for m in layer.inputs], serve(layer.down)
    images = [image.approximate(m) for m in served]
    doubts = [(m.values - i).square().mean(1).sqrt().half().float() for m, i in zip(served, images, strict=True)]
    found = []  # of each neuron: what it mends, what it matters, its exact and its previewed part of the answer
    for expert, weight in zip(index.tolist(), weights, strict=True):
        rows, own, coarse = layer.rows(expert), down.values, image.approximate(down)
        g, u = (i[rows] @ x + b[rows] for i, b in zip(images, layer.biases, strict=True))
        off = [x.norm() * d[rows] for d in doubts]
        preview = act(g, layer.name) * rest(u, layer.name) * weight
        expected = (act(g + off[0], layer.name).square() + act(g - off[0], layer.name).square()) / 2
        expected = expected * (rest(u + off[1], layer.name).square() + rest(u - off[1], layer.name).square()) / 2
        expected = expected * weight**2
        exact = [m.values[rows] @ x + b[rows] for m, b in zip(served, layer.biases, strict=True)]
        h = act(exact[0], layer.name) * rest(exact[1], layer.name) * weight
        norms = own[layer.columns(expert)].norm(dim=0).half().float().square()
        for j in range(layer.inner):
            mends = max(0.0, float(expected[j] - (1 - known) * preview[j] ** 2)) * float(norms[j])
            parts = (h[j] * own[layer.columns(expert), j], preview[j] * coarse[layer.columns(expert), j])
            found.append((mends, float(expected[j] * norms[j]), *parts))
    order = sorted(range(len(found)), key=lambda i: -found[i][0])
    others = sorted(order[counts[0] :], key=lambda i: -found[i][1])[: counts[1] - counts[0]]
    out = sum(w * layer.down_bias[e] for e, w in zip(index.tolist(), weights, strict=True))
    return out + sum(found[i][2] for i in order[: counts[0]]) + sum(found[i][3] for i in others)


IMAGES = {
    "copy": ({"image": "copy", "image.bits": 4}, Copy(bits=4), Served),
    "first bits": ({}, FirstBits(bits=4), lambda m: Served(m, packed=rounded(m, parse("8:128")))),
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_token_reads_more_bits_of_what_matters_more_of_its_experts(name, image):
    given, part, serve = IMAGES[image]
    model, prompt = tiny(name), prompts_of(2, 12)
    layer, before, seen = Layer(model, name), bits(model), {}
    experts = model.model.layers[LAYER].mlp.experts
    hook = experts.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], at=args[1], w=args[2], out=out))
    sparsity = 0.4 if image == "copy" else 0.55
    with open_session(model, "dart-plus", sparsity, **given) as session:
        generate(model, prompt, 3)
        counts = int(session.state.taken[0, LAYER]), int(session.state.written[0, LAYER])
        reads = torch.stack([step.read for step in session.steps])
    hook.remove()
    assert same(model, before)
    neurons = sum(f.size for f in find_ffns(model))
    label = round((1 - sparsity) * neurons) / neurons
    assert bool((reads <= label + 1e-9).all()) and bool((reads > label - 0.02).all())
    assert 0 < counts[0] < counts[1] <= find_ffns(model)[LAYER].size
    for row in range(2):
        wanted = by_hand(layer, part, serve, seen["x"][row], seen["at"][row], seen["w"][row], counts)
        assert torch.allclose(seen["out"][row], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_through_the_weights_themselves_it_is_the_exact_choice(name):
    """Gate and up are read whole: what is left to choose are columns of down, by exact |h|."""
    model, prompt = tiny(name), prompts_of(2, 12)
    share = 1 if name == "nemotron_h" else 2
    matrices = share + 1
    with open_session(model, "preview", 0.2, image="weights", **{"choice.write_share": 1.0}) as session:
        ours = generate(model, prompt, 4)
        taken = session.state.taken[0].tolist()
    ffns = find_ffns(model)
    exact = 1 - sum(taken) / sum(f.size for f in ffns)
    assert exact == pytest.approx(0.2 * matrices, abs=0.02)
    with open_session(model, "oracle-token", exact):
        theirs = generate(model, prompt, 4)
    assert torch.allclose(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


def test_bytes_beside_the_model_are_those_of_all_experts():
    """Of every row of gate and up a doubt of 16 bits, of every neuron a norm of 16."""
    model = tiny("qwen3_moe")
    with open_session(model, "dart-plus", 0.5) as session:
        assert session.prepared.stored == sum(f.pool * 3 * 2 for f in find_ffns(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_what_is_usual_of_up_is_that_of_a_tokens_own_experts(name):
    """gate-up goes by |act(gate x)| times the rms of up x over the context, expert by expert."""
    model, prompt = tiny(name), prompts_of(1, 12)
    layer, seen = Layer(model, name), {}
    experts = model.model.layers[LAYER].mlp.experts
    hook = experts.register_forward_hook(lambda _m, args, out: seen.setdefault("all", []).append((*args, out)))
    with open_session(model, "griffin", 0.3, choice="gate-up", mask="everything") as session:
        generate(model, prompt, 2)
        counts = int(session.state.taken[0, LAYER])
    hook.remove()
    (x, index, weights, _), (new, at, w, out) = seen["all"][-2:]  # after the trial forwards
    squares, had = torch.zeros(layer.count, layer.inner), [0] * layer.count
    for token, chosen, by in zip(x, index.tolist(), weights, strict=True):
        for expert, weight in zip(chosen, by, strict=True):
            u = layer.inputs[1][layer.rows(expert)] @ token + layer.biases[1][layer.rows(expert)]
            squares[expert] += (rest(u, name) * weight).square()
            had[expert] += 1
    assert all(had[e] for e in at[0].tolist()) and len(set(had)) > 1  # rare experts are no less usual
    found, wanted = [], sum(v * layer.down_bias[e] for e, v in zip(at[0].tolist(), w[0], strict=True))
    for expert, weight in zip(at[0].tolist(), w[0], strict=True):
        rows = layer.rows(expert)
        g, u = (m[rows] @ new[0] + b[rows] for m, b in zip(layer.inputs, layer.biases, strict=True))
        h = act(g, name) * rest(u, name) * weight
        scores = act(g, name).abs() * (squares[expert] / had[expert]).sqrt()
        found += [(float(s), v * layer.down[layer.columns(expert), j]) for j, (s, v) in enumerate(
            zip(scores, h, strict=True))]  # fmt: skip
    wanted = wanted + sum(part for _, part in sorted(found, key=lambda one: -one[0])[:counts])
    assert torch.allclose(out[0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
