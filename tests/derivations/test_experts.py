"""Experts: masks, re-masks, depth and few bits, by hand from what stock experts are given."""

from contextlib import contextmanager

import pytest
import torch

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.method import Method
from dart_eval.pruning.registry import methods
from dart_eval.util.bits import Rounding, parse
from dart_eval.weights.rounding import rounded, served_share
from tests.helpers.matrices import in_turn
from tests.helpers.models import random_tokens
from tests.helpers.sessions import RESTLESS, bits, generate, open_session, prompts_of, same
from tests.matrix.types import tiny


def scores_by_hand(model, prompt, layer):
    """[E, I]: the sums over tokens of (h w / |h w|)^2, h w being a token's activations with the router's weights.

    From the experts' inputs alone, and by the formulas of SwiGLU and of gpt-oss.
    """
    with torch.no_grad(), watching(model, layer) as seen:
        model(input_ids=prompt)
    (*given, _answer), experts = seen[0], model.model.layers[layer].mlp.experts
    each = [of_token(experts, *token) for token in zip(*given, strict=True)]
    return sum((h / h.norm()).square() for h in each), set(given[1].flatten().tolist())


@pytest.mark.parametrize(("name", "length"), [("qwen3_moe", 24), ("qwen3_moe", 1), ("gpt_oss", 24), ("mixtral", 2)])
def test_griffins_mask_has_equally_many_neurons_of_each_expert(name, length):
    model = tiny(name)
    prompt = torch.tensor([random_tokens(length)])
    by_hand = [scores_by_hand(model, prompt, layer) for layer in range(2)]
    with torch.no_grad(), open_session(model, "griffin", 0.5) as session:
        model(input_ids=prompt, use_cache=True)
        masks = session.masks(0)
    for ffn, mask, (scores, seen) in zip(find_ffns(model), masks, by_hand, strict=True):
        mask = mask.view(scores.shape)
        down = ffn.output_weight().view(ffn.width, *scores.shape).norm(dim=0)
        for expert, mine in enumerate(scores):
            order = mine if expert in seen else down[expert]  # an expert that no token has had: by its columns of down
            best = order.argsort(descending=True)[: scores.shape[1] // 2]
            assert sorted(best.tolist()) == mask[expert].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_experts_under_prune_are_stock_experts(name):
    """With all neurons the logits are those of transformers' own function; and outside it is that one again."""
    model = tiny(name)
    prompts = prompts_of(3, 12)
    config = model.config
    before = config._experts_implementation
    with torch.no_grad():
        stock = model(input_ids=prompts).logits
        with open_session(model, "oracle-token", 0.0):
            assert config._experts_implementation != before
            ours = model(input_ids=prompts, use_cache=True).logits
        assert config._experts_implementation == before
        assert torch.equal(model(input_ids=prompts).logits, stock)
    assert torch.allclose(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [
    "magnitude", "m-countdown", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cats", "oracle-token"))
])  # fmt: skip
def test_tokens_of_a_batch_have_the_neurons_of_their_own_experts(method):
    """A mask of everything, or the same for all sequences, is looked up for each of them."""
    model, prompts = tiny("qwen3_moe"), prompts_of(3, 12)
    with open_session(model, method, 0.4, "masked"):
        together = generate(model, prompts, 4)
    for row, prompt in enumerate(prompts):
        with open_session(model, method, 0.4, "masked"):
            alone = generate(model, prompt[None], 4)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        logits = [torch.stack([step[i] for step in found.logits]) for i, found in ((row, together), (0, alone))]
        assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sparsity"), in_turn(["griffin", "magnitude"], [0.3, 0.41, 0.5, 0.57, 0.7]))
def test_what_is_rounded_in_a_layer_of_experts_is_made_up_for_in_others(method, sparsity):
    """The read misses the label by less than a neuron of each of a token's experts, over all layers, and never more."""
    model = tiny("qwen3_moe", depth=4)
    ffns = find_ffns(model)
    neurons = sum(f.size for f in ffns)
    with open_session(model, method, sparsity, "masked") as session:
        generate(model, prompts_of(2, 12), 4)
        reads = torch.stack([step.read for step in session.steps]) * neurons
        kept = [torch.stack([session.masks(row)[i] for row in range(2)]).view(-1, 4, 16).sum(-1) for i in range(4)]
    label = round((1 - sparsity) * neurons)
    assert bool((reads <= label + 1e-9).all()) and bool((reads > label - 2).all())
    assert all(bool((layer == layer[:, :1]).all()) for layer in kept)  # every expert of a layer has as many


# -- re-masks, means and the depth-aware allocation -------------------------------------------------------------------


LAYER = 1


@contextmanager
def watching(model, layer=LAYER):
    """(x [N, D], experts [N, count], weights [N, count], answer [N, D]) of each forward of one layer's experts."""
    seen = []
    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_hook(lambda _m, args, out: seen.append((*args, out)))
    try:
        yield seen
    finally:
        hook.remove()


def hidden(experts, x, expert):
    """[I], h of one token in one expert, without the router's weight: SwiGLU, or gpt-oss's clamped gate."""
    if hasattr(experts, "gate_up_proj_bias"):
        made = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = made[::2].clamp(max=7.0), made[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return gate * torch.sigmoid(gate) * up


@torch.no_grad()
def of_token(experts, x, index, weights):
    """[E, I], h of one token with the router's weights; 0 for experts that it does not have."""
    found = [hidden(experts, x, e) * w for e, w in zip(index.tolist(), weights, strict=True)]
    h = torch.zeros(len(experts.down_proj), len(found[0]))
    for expert, part in zip(index.tolist(), found, strict=True):
        h[expert] = part
    return h


def columns(experts):
    """[E, D, I], down of every expert."""
    return experts.down_proj.mT if hasattr(experts, "gate_up_proj_bias") else experts.down_proj


EVERY = {"allocation": "uniform", **RESTLESS, "remask.blend": 0.2}
DENSE = {"allocation": "uniform", **RESTLESS, "remask.dense_tokens": 2, "remask.blend": 0.3}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("params", "steps", "old", "recent"), [
    (EVERY, 3, 0.2, [-5, -4, -3, -2, -1]),  # two tokens of the prompt, three that were decoded
    ({**EVERY, "remask.blend": 0.0}, 3, 0.0, [-5, -4, -3, -2, -1]),
    (DENSE, 5, 0.3, [-2, -1]),  # an alarm after the third decoded token, then two dense ones
])  # fmt: skip
def test_a_new_mask_is_made_from_recent_tokens_under_their_own_experts(name, params, steps, old, recent):
    model, prompts = tiny(name), prompts_of(2, 9)
    experts, before = model.model.layers[LAYER].mlp.experts, bits(model)
    with watching(model) as seen, open_session(model, "dart", 0.5, "masked", **params) as session:
        seen.clear()  # the trial forwards
        generate(model, prompts, steps + 1)
        assert session.remasks == [1, 1]
        masks = session.rows.mask[LAYER]
        assert torch.equal(find_ffns(model)[LAYER].routed.index, seen[-1][1])  # of the forward before it
        first = [event["overlap"][LAYER] for event in session.events]
    assert same(model, before)
    for row in range(2):
        parts = ([part.view(2, -1, part.shape[-1])[row] for part in given] for *given, _answer in seen)
        scores = [of_token(experts, *token).square() for part in parts for token in zip(*part, strict=True)]
        prompt, late = sum(scores[:9]) / 9, sum(scores[i] for i in recent) / len(recent)
        unseen = (late == 0).all(-1, keepdim=True)  # experts that no recent token had keep their old scores
        new = old * prompt + (1 - old) * torch.where(unseen, prompt, late)
        never = (new == 0).all(-1, keepdim=True)
        new = torch.where(never, columns(experts).norm(dim=1), new)
        best = torch.zeros_like(new, dtype=torch.bool)
        best.scatter_(1, new.topk(new.shape[1] // 2).indices, True)
        assert torch.equal(masks[row].view_as(best), best)
        assert 0 < first[row] < 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_depth_goes_by_what_all_experts_of_a_layer_add(name):
    model, prompt = tiny(name), prompts_of(1, 10)
    layer, found = model.model.layers[LAYER], {}
    with torch.no_grad(), open_session(model, "dart", 0.5, "masked") as session:
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: found.update(y=args[0][0])),
            layer.register_forward_hook(lambda _m, _a, out: found.update(after=out)),
        ]  # fmt: skip
        model(input_ids=prompt, use_cache=True)
        for hook in hooks:
            hook.remove()
        cosine, change = session.rows.change.cosine[0, LAYER], session.rows.change.change[0, LAYER]
    y, z = found["y"], torch.as_tensor(found["after"]).view(10, -1) - found["y"]
    wanted = [float((a @ b) / a.norm() / b.norm()) for a, b in zip(y, z, strict=True)]
    moved = [float((b - a).norm() / a.norm()) for a, b in zip(y, z, strict=True)]
    assert float(cosine) == pytest.approx(sum(wanted), rel=1e-3, abs=1e-3)
    assert float(change) == pytest.approx(sum(moved), rel=1e-3)


EVERY_METHOD = [cls() for cls in methods().values() if cls.prunes and not cls.looks_ahead and cls.fits_experts
                and cls.write is Method.write]  # fmt: skip


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=[] if i % 5 == 0 else [pytest.mark.slow]) for i, m in enumerate(EVERY_METHOD)
], ids=lambda m: m.spec)  # fmt: skip
def test_every_method_runs_on_experts(method):
    """Without sparsity as dense; with it never above the label, the same alone and in a batch."""
    model, prompts = tiny("qwen3_moe"), prompts_of(2, 12)
    dense = generate(model, prompts, 5)
    if method.sized:
        with open_session(model, method, 0.0, "masked"):
            assert torch.equal(generate(model, prompts, 5).sequences, dense.sequences)
    sparsity = 0.5 if "bits" in method.granularity else 0.4  # weights of 8 bits are half
    with open_session(model, method, sparsity, "masked") as session:
        together = generate(model, prompts, 5)
        reads = torch.stack([step.read for step in session.steps])
    if method.sized:
        most = round((1 - sparsity) * 128) / 128
        assert bool((reads <= most + 1e-9).all()) and bool((reads >= 0.45).all())
    with open_session(model, method, sparsity, "masked"):
        alone = generate(model, prompts[1:], 5)
    logits = [torch.stack([step[row] for step in run.logits]) for run, row in ((together, 1), (alone, 0))]
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together.logits[1], dense.logits[1])


# -- on few bits: each matrix of each expert by itself, in whatever layout a type keeps them --------------------------


PLAIN, GATED = "nemotron_h", ("qwen3_moe", "gpt_oss", "deepseek_v3")


def matrices(name, experts):
    """Of each expert gate (of a plain FFN up), up and down as [out, in]: views into the parameters, type by type."""
    for e in range(len(experts.down_proj)):
        if name == "gpt_oss":  # [in, out], gate and up in turn
            yield experts.gate_up_proj[e].T[::2], experts.gate_up_proj[e].T[1::2], experts.down_proj[e].T
        elif name == PLAIN:
            yield experts.up_proj[e], experts.down_proj[e]
        else:
            half = experts.gate_up_proj.shape[1] // 2
            yield experts.gate_up_proj[e, :half], experts.gate_up_proj[e, half:], experts.down_proj[e]


def experts_of(model):
    return [f.routed.experts for f in find_ffns(model) if f.routed]


# Groups that divide a row, and others.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), in_turn([*GATED, PLAIN], ["4", "3:24", "4:row", "4:5"]))
def test_each_matrix_of_each_expert_is_rounded_by_itself(name, text):
    model = tiny(name)
    own, before = [[m.clone() for m in each] for x in experts_of(model) for each in matrices(name, x)], bits(model)
    with dart_eval.rounded_ffns(model, text):
        now = [[m.clone() for m in each] for x in experts_of(model) for each in matrices(name, x)]
        assert all(p.is_contiguous() for x in experts_of(model) for p in x.parameters())
    assert same(model, before)
    assert len(own) == len(now) and not torch.equal(own[0][0], now[0][0])
    for was, became in zip(own, now, strict=True):
        for a, b in zip(was, became, strict=True):
            assert torch.allclose(b, rounded(a, parse(text)).values, atol=1e-7)


@pytest.mark.parametrize(("name", "inner", "matrices_of"), [("qwen3_moe", 16, 3), ("gpt_oss", 48, 3)])
def test_dense_on_few_bits_is_a_control_for_experts_too(name, inner, matrices_of):
    """A weight has 4 bits and its part of a scale of 16: rows of 32 in gate and up, of `inner` in down."""
    model, prompt = tiny(name), prompts_of(1, 12)
    into, out = Rounding(4).weight_bits(32), Rounding(4).weight_bits(inner)
    wanted = ((matrices_of - 1) * into + out) / matrices_of / 16
    assert out == 4 + 16 * -(-inner // 32) / inner
    with dart_eval.rounded_ffns(model, 4):
        assert served_share(find_ffns(model)) == pytest.approx(wanted)
        dense = generate(model, prompt, 3)
        with open_session(model, "griffin", 0.0) as session:
            assert torch.equal(generate(model, prompt, 3).sequences, dense.sequences)
            assert session.weights_read == pytest.approx(wanted)
        with open_session(model, "griffin", 0.5) as session:
            generate(model, prompt, 3)
            across = (out - 4) / matrices_of / 16  # the scales of down, each of which stands for several neurons
            assert session.weights_read == pytest.approx((wanted + across) / 2)
    assert served_share(find_ffns(model)) == 1
    assert not torch.equal(generate(model, prompt, 3).logits[0], dense.logits[0])
