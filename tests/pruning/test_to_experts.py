"""A dense model converted to a mixture of experts (scripts/to_experts.py)."""

import pytest
import torch

from dart_eval.layers.find import find_ffns
from scripts import to_experts
from tests.helpers.models import tiny
from tests.helpers.sessions import prompts_of

SETTINGS = ["model", "folder", "--experts", "4", "--per-token", "2", "--shared", "8", "--tokens", "256"]


def mixture(dense, tokenizer, *more):
    """Four experts of 8 of a layer's 40 neurons, and 8 shared ones."""
    return to_experts.converted(dense, tokenizer, to_experts.arguments().parse_args([*SETTINGS, *more]))


@torch.no_grad()
def logits(model):
    return model(input_ids=prompts_of(1, 12)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_with_all_experts_it_is_the_dense_model(family, tokenizer):
    dense = tiny(family, torch.float32)
    few, every = mixture(dense, tokenizer), mixture(dense, tokenizer, "--per-token", "4")
    wanted = logits(dense)
    far = (logits(few) - wanted).abs().max()
    assert (logits(every) - wanted).abs().max() < 2e-3 * far  # weights are 1/4 but for 2^-12
    ffns = find_ffns(few)
    for ffn in find_ffns(dense):  # each neuron once
        parts = [f.input_weights()[0] for f in ffns if f.number == ffn.number]
        assert sorted(torch.cat(parts).tolist()) == sorted(ffn.input_weights()[0].tolist())


def test_router_weights_differ_with_a_spread(tokenizer):
    """Their order is that without one; of two experts of a token the better has more weight."""
    dense, seen = tiny("llama", torch.float32), []
    for spread in ("0", "1"):
        moe = mixture(dense, tokenizer, "--spread", spread)
        router = moe.model.layers[0].mlp.gate
        hook = router.register_forward_hook(lambda _m, _a, out: seen.append(out))
        logits(moe)
        hook.remove()
    (_, flat, first), (_, weights, second) = seen
    assert torch.equal(first, second)
    assert (flat - 0.25).abs().max() < 1e-3
    assert float((weights[:, 0] / weights[:, 1]).mean()) > 1.02


def test_experts_of_another_size_are_refused(tokenizer):
    with pytest.raises(SystemExit, match="38 neurons are no 4 experts"):
        mixture(tiny("llama"), tokenizer, "--shared", "2")
