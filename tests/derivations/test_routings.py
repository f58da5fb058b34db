"""Fewer experts, and experts dropped: held against stock models that have as many, and against sums by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch

from dart_eval.layers.experts import ROUTED
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.experts.rerouted import Order, saliency
from dart_eval.pruning.experts.routings import Fewer
from dart_eval.pruning.registry import make
from dart_eval.util.errors import UserError
from tests.derivations.test_expert_remasks import columns, hidden
from tests.helpers.models import random_tokens
from tests.helpers.sessions import RandomCalibration, bits, cache_of, generate, open_session, prompts_of, same
from tests.matrix.types import tiny

NAMES = [
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "deepseek_v3",
]  # weights that sum to 1, a softmax of the best, neither, biased


def wider(name, experts=6, count=4):
    """A tiny model whose tokens have 4 of 6 experts in each of 4 layers."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(tiny(name).config)
    for field in (*ROUTED, "num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, count if field in ROUTED else experts)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.generation_config.eos_token_id = None
    return model


def with_count(model, layer, count):
    """Let the stock router of a layer choose so many experts."""
    for module in model.model.layers[layer].modules():
        if hasattr(module, "top_k"):
            module.top_k = count


@torch.no_grad()
def after(model, other, prompt):
    """Logits of the first token that `other` decodes on the cache that the model's prompt leaves."""
    out = model(input_ids=prompt, use_cache=True)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    return other(input_ids=token, use_cache=True, **{cache_argument(model): cache_of(out)}).logits[:, -1]


def written(experts, x, expert):
    """[D], what one expert makes of one token."""
    out = columns(experts)[expert] @ hidden(experts, x, expert)
    return out + experts.down_proj_bias[expert] if hasattr(experts, "down_proj_bias") else out


@pytest.mark.parametrize("name", NAMES)
def test_fewer_experts_are_a_stock_model_with_fewer(name):
    """At .4 of four experts in four layers 2.4 are left: 2, 2, 3, 2; of DeepSeek's layers the first has none."""
    model, prompt = wider(name), prompts_of(2, 12)
    ffns = find_ffns(model)
    size, routed = sum(f.size for f in ffns), [f.number for f in ffns if f.routed]
    sparsity = 0.4 * sum(f.size for f in ffns if f.routed) / size
    before = bits(model)
    with open_session(model, "fewer-experts", sparsity) as session:
        ours = generate(model, prompt, 2).logits[1]
        read = session.weights_read
    less, counts = copy.deepcopy(model), [2, 2, 3, 2][: len(routed)]
    for layer, count in zip(routed, counts, strict=True):
        with_count(less, layer, count)
    theirs, dense = after(model, less, prompt), after(model, model, prompt)
    assert (ours - theirs).abs().max() < 1e-4 * (ours - dense).abs().max()
    inner = next(f.routed.inner for f in ffns if f.routed)
    saved = sum(4 - n for n in counts) * inner
    assert read == pytest.approx(1 - saved / size)
    assert read <= 1 - sparsity + 1e-9 and read > 1 - sparsity - inner / size
    assert same(model, before)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_weights_may_stay_those_of_all_of_a_tokens_experts(name):
    """By hand, one layer: the two largest of four weights, as they are; experts that are left out write no bias."""
    model, prompt = wider(name), prompts_of(1, 12)
    experts = model.model.layers[0].mlp.experts
    seen = {}
    hook = experts.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], at=args[1], w=args[2], out=out))
    with torch.no_grad(), open_session(model, "fewer-experts", 0.5, **{"routing.weights": "all"}):
        generate(model, prompt, 2)
    hook.remove()
    assert seen["w"].shape == (1, 4)
    order = seen["w"][0].argsort(descending=True)[:2].tolist()
    wanted = torch.zeros_like(seen["out"][0])
    for place in order:
        wanted += seen["w"][0, place] * written(experts, seen["x"][0], int(seen["at"][0, place]))
    assert torch.allclose(seen["out"][0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.3, 0.6, 0.75])
def test_whole_experts_never_read_more_than_the_label(sparsity):
    ffns = find_ffns(wider("qwen3_moe"))
    counts = make("fewer-experts").routing.counts(sparsity, ffns)
    assert 0 <= (1 - sparsity) * 16 - sum(counts) < 1 + 1e-9  # of 16 experts in four layers
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1


def saliency_by_hand(model, ids):
    """Per layer [E]: the mean over the tokens that have an expert of weight * |what it writes|, in stock's own run."""
    found = []
    for layer in model.model.layers:
        given, experts = {}, layer.mlp.experts
        hook = experts.register_forward_pre_hook(
            lambda _m, args, given=given: given.update(x=args[0], at=args[1], w=args[2])
        )
        with torch.no_grad():
            model(input_ids=ids)
        hook.remove()
        sums, seen = [0.0] * 6, [0] * 6
        for x, index, weights in zip(given["x"], given["at"], given["w"], strict=True):
            for expert, weight in zip(index.tolist(), weights.tolist(), strict=True):
                sums[expert] += weight * written(experts, x, expert).norm().item()
                seen[expert] += 1
        found.append(torch.tensor([s / max(1, n) for s, n in zip(sums, seen, strict=True)]))
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "olmoe"])
def test_dropped_experts_are_a_stock_model_without_them(name):
    """A third of six goes by the saliency by hand; the others are a model of four experts with their rows."""
    model, prompt = wider(name, count=2), prompts_of(2, 12)
    by_hand = saliency_by_hand(model, torch.tensor([random_tokens(200, seed=5)]))  # as RandomCalibration has them
    ours = saliency(find_ffns(model), RandomCalibration(model))
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours, by_hand, strict=True))
    before = bits(model)
    with open_session(model, "drop-experts", **{"routing.share": 0.34}) as session:
        pruned = generate(model, prompt, 2).logits[1]
        assert session.weights_read == 1 and session.effective_sparsity == 0 and session.prepared.nbytes() == 4 * 6
    assert same(model, before)
    left = copy.deepcopy(model)
    for layer, scores in zip(left.model.layers, by_hand, strict=True):
        keep = scores.argsort(descending=True)[:4].sort().values
        router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        for module in (router, layer.mlp.experts):
            for p in module.parameters():
                p.data = p.data[keep]
            module.num_experts = 4
    theirs, dense = after(model, left, prompt), after(model, model, prompt)
    assert (pruned - theirs).abs().max() < 1e-4 * (pruned - dense).abs().max()


def test_an_expert_that_no_token_had_goes_first():
    model = wider("qwen3_moe", count=2)
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():  # of two and their opposites two are above 0, which the last two have for every token
        router.weight[2:4] = -router.weight[:2]
        router.weight[4:] = 0
    with open_session(model, "drop-experts", **{"routing.share": 0.34}) as session:
        assert session.prepared.beside.orders[1].available.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("method", "sparsity", "words"), [
    ("fewer-experts", 0.8, "leaves each token an expert in every layer, and sparsity 0.8 leaves less; .* up to 0.75"),
    ("drop-experts:routing.share=0.6", 0.5, "leaves 3 of 6 experts, and a token has 4; use a routing.share up to 0.33"),
])  # fmt: skip
def test_what_cannot_be_met_is_one_line(method, sparsity, words):
    name, _, rest = method.partition(":")
    with (
        pytest.raises(UserError, match=words),
        open_session(wider("qwen3_moe"), name, sparsity, **dict([rest.split("=")] if rest else [])),
    ):
        pass


def test_the_layer_with_the_fewest_experts_a_token_says_what_can_be_met():
    """Four experts of 8 neurons in one layer, two in the other: one of each reads a quarter, and a half of them all."""
    ffns = [SimpleNamespace(size=8 * n, routed=SimpleNamespace(count=n, all=9, inner=8, size=8 * n)) for n in (4, 2)]
    Fewer().check_experts(0.5, ffns)
    with pytest.raises(UserError, match=r"use a sparsity up to 0\.5$"):
        Fewer().check_experts(0.6, ffns)


@pytest.mark.parametrize("method", ["fewer-experts", "drop-experts"])
def test_a_dense_model_is_refused(llama, method):
    with pytest.raises(UserError, match="leaves out experts, and this model has none"), open_session(llama, method):
        pass


def test_a_router_that_is_not_understood_is_refused():
    model = tiny("phimoe")
    for method in ("fewer-experts", "drop-experts"):
        with open_session(model, method), pytest.raises(UserError, match="the router of PhimoeExperts chooses"):
            generate(model, prompts_of(1, 8), 3)
        assert model.model.layers[0].mlp.experts is not None
    with torch.no_grad():
        assert torch.overrides._get_current_function_mode_stack() == []


def test_experts_and_neurons_are_not_left_out_at_once():
    with pytest.raises(UserError, match="the method leaves out neurons, but routing=fewer leaves out experts"):
        make("griffin", {"routing": "fewer"})


def test_attention_is_no_router():
    """16 heads and 4 keys are as many numbers as 64 experts."""
    routed = SimpleNamespace(all=64, count=8)
    attention, router = torch.randn(1, 16, 1, 4), torch.randn(3, 64)
    with Order(routed, 8, True, torch.arange(64) < 40):
        found, chosen = attention.softmax(-1), router.softmax(-1)
    assert torch.equal(found, attention.softmax(-1)) and (chosen[:, 40:] == 0).all()
