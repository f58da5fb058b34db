"""Masks of experts, computed by hand from what stock experts are given."""

import pytest
import torch

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import make, parse
from tests.derivations.test_expert_remasks import hidden
from tests.helpers.matrices import in_turn
from tests.helpers.models import random_tokens
from tests.helpers.sessions import generate, open_session, prompts_of
from tests.matrix.types import tiny


def scores_by_hand(model, prompt, layer):
    """[E, I]: the sums over tokens of (h w / |h w|)^2, h w being a token's activations with the router's weights.

    From the experts' inputs alone, and by the formulas of SwiGLU and of gpt-oss.
    """
    block = model.model.layers[layer].mlp
    given = {}
    hook = block.experts.register_forward_pre_hook(lambda _m, args: given.update(x=args[0], at=args[1], w=args[2]))
    with torch.no_grad():
        model(input_ids=prompt)
    hook.remove()
    experts, scores = block.experts, None
    for x, index, weights in zip(given["x"], given["at"], given["w"], strict=True):
        found = [(e, hidden(experts, x, e) * w) for e, w in zip(index.tolist(), weights, strict=True)]
        norm = torch.cat([h for _, h in found]).norm()
        scores = torch.zeros(len(experts.down_proj), len(found[0][1])) if scores is None else scores
        for expert, h in found:
            scores[expert] += (h / norm).square()
    return scores, sorted(set(given["at"].flatten().tolist()))


@pytest.mark.parametrize(("name", "length"), [("qwen3_moe", 24), ("qwen3_moe", 1), ("gpt_oss", 24), ("mixtral", 2)])
def test_griffins_mask_has_equally_many_neurons_of_each_expert(name, length):
    model = tiny(name)
    prompt = torch.tensor([random_tokens(length)])
    by_hand = [scores_by_hand(model, prompt, layer) for layer in range(4)]
    with torch.no_grad(), open_session(model, "griffin", 0.5) as session:
        model(input_ids=prompt, use_cache=True)
        masks = [session.masks(0)[layer] for layer in range(4)]
    for layer, (scores, seen) in enumerate(by_hand):
        ffn = find_ffns(model)[layer]
        mask = masks[layer].view(scores.shape)
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


def test_a_choice_pools_the_neurons_of_a_tokens_experts():
    """The largest |h| times the router's weight, whichever expert they belong to."""
    model = tiny("mixtral")
    seen = {}
    with torch.no_grad(), open_session(model, "oracle-token", 0.5) as session:
        out = model(input_ids=prompts_of(1, 8), use_cache=True)
        ffn = find_ffns(model)[1]
        first = ffn.down.register_forward_pre_hook(lambda _m, args: seen.update(before=args[0]), prepend=True)
        last = ffn.down.register_forward_pre_hook(lambda _m, args: seen.update(after=args[0]))
        model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values, use_cache=True)
        first.remove()
        last.remove()
        assert float(session.steps[-1].read[0]) == 0.5
    kept = seen["after"][0].nonzero().flatten().tolist()
    assert kept == sorted(seen["before"][0].abs().topk(ffn.size // 2).indices.tolist())


@pytest.mark.parametrize("method", [
    "magnitude", "m-countdown", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cats", "oracle-token"))
])  # fmt: skip
def test_tokens_of_a_batch_have_the_neurons_of_their_own_experts(method):
    """A mask of everything, or the same for all sequences, is looked up for each of them."""
    model, prompts = tiny("qwen3_moe"), prompts_of(3, 12)
    with open_session(model, make(*parse(method)), 0.4, "masked"):
        together = generate(model, prompts, 4)
    for row, prompt in enumerate(prompts):
        with open_session(model, make(*parse(method)), 0.4, "masked"):
            alone = generate(model, prompt[None], 4)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        logits = [torch.stack([step[i] for step in found.logits]) for i, found in ((row, together), (0, alone))]
        assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "sparsity"), in_turn(
    ["griffin", "magnitude"], [0.3, 0.41, 0.5, 0.57, 0.7]
))  # fmt: skip
def test_what_is_rounded_in_a_layer_of_experts_is_made_up_for_in_others(method, sparsity):
    """The read misses the label by less than a neuron of each of a token's experts, over all layers, and never more."""
    model = tiny("qwen3_moe")
    ffns = find_ffns(model)
    neurons = sum(f.size for f in ffns)
    with open_session(model, make(*parse(method)), sparsity, "masked") as session:
        generate(model, prompts_of(2, 12), 4)
        reads = torch.stack([step.read for step in session.steps]) * neurons
        kept = [torch.stack([session.masks(row)[i] for row in range(2)]).view(-1, 4, 16).sum(-1) for i in range(4)]
    label = round((1 - sparsity) * neurons)
    assert bool((reads <= label + 1e-9).all()) and bool((reads > label - 2).all())
    assert all(bool((layer == layer[:, :1]).all()) for layer in kept)  # every expert of a layer has as many
