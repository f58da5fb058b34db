"""Scores by hand: normalisation, aggregation, first token, projection onto the vocabulary, down norms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config

from dart_eval.layers.families import final_norm
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.vocabulary import gain, project
from dart_eval.pruning.masks.scores import Activation, Random, activations, decayed
from tests.helpers.models import SMALL, tiny
from tests.helpers.sessions import state_of

EMA = {"score.average": "ema", "score.decay": 0.9}


@pytest.mark.parametrize("norm", ["none", "l1", "l2"])
@pytest.mark.parametrize("power", [1, 2])
def test_sums_of_activations_by_hand(norm, power):
    torch.manual_seed(0)
    h, weight = torch.randn(2, 5, 7), torch.rand(2, 5)
    weight[0, 0] = 0
    for row in range(2):
        wanted = torch.zeros(7)
        for t in range(5):
            token = h[row, t]
            size = {"none": 1, "l1": token.abs().sum(), "l2": token.norm()}[norm]
            wanted += weight[row, t] * (token.abs() / size) ** power
        assert torch.allclose(activations(h, weight, norm, power)[row], wanted, rtol=1e-5)


def test_a_token_without_activations_counts_nothing():
    assert torch.equal(activations(torch.zeros(1, 2, 3), torch.ones(1, 2), "l2"), torch.zeros(1, 3))


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 1.0))
def test_an_exponential_average_does_not_see_chunks_or_padding(pad, first, second, decay):
    h = torch.randn(1, first + second, 4, generator=torch.Generator().manual_seed(first))
    n = first + second
    wanted = sum(decay ** (n - 1 - t) * h[0, t].abs() for t in range(n))
    total = torch.zeros(1, 4)
    for part, padding in ((h[:, :first], pad), (h[:, first:], pad)):
        x = torch.cat([torch.full((1, padding, 4), 9.0), part], 1)
        valid = (torch.arange(x.shape[1])[None] >= padding).float()
        weight, shrink = decayed(valid, decay)
        total = total * shrink[:, None] + activations(x, weight, power=1)
    assert torch.allclose(total[0], wanted, rtol=1e-4, atol=1e-6)


def _seen(model, params, h, split=None):
    """The state's score of every neuron of layer 0 after a context with these activations."""
    state = _state_after(model, params, h, split)
    return state.layers[0].sums["score"][0] / state.weight[0]


def _state_after(model, params, h, split=None):
    """DART's state after a context with these activations in every layer, in one piece or two."""
    state = state_of("dart", model, allocation="uniform", **params)
    parts = [h] if split is None else [h[:, :split], h[:, split:]]
    for part in parts:
        valid = torch.ones(part.shape[:2], dtype=torch.bool)
        for layer in range(len(state.ffns)):
            state.observe(layer, part, valid)
        state.finish_context(valid)
    return state


@pytest.mark.parametrize("split", [None, 1, 4])
def test_the_average_of_magnitudes_is_the_formula(llama, split):
    h = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([0.9 ** (6 - t) for t in range(7)])
    wanted = (weight[:, None] * h[0].abs()).sum(0) / weight.sum()
    got = _seen(llama, EMA, h, split)
    assert torch.allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("split", [None, 1, 4])
@pytest.mark.parametrize("average", ["l2", "ema"])
def test_the_mean_that_makes_up_for_the_pruned_weighs_tokens_as_the_scores_do(llama, split, average):
    h = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([0.9 ** (6 - t) if average == "ema" else 1.0 for t in range(7)])
    params = {"score.average": average, "score.decay": 0.9, "compensation": "mean"}
    state = _state_after(llama.float(), params, h, split)
    wanted = (weight[:, None] * h[0]).sum(0) / weight.sum()
    assert torch.allclose(state.layers[0].sums["compensation"][0] / state.weight[0], wanted, atol=1e-6)
    outside = wanted * ~state.masks[0][0]
    assert torch.allclose(state.layers[0].constant[0], find_ffns(llama)[0].output_weight().float() @ outside, atol=1e-5)


@pytest.mark.parametrize("split", [None, 1, 4])
def test_the_first_token_can_be_left_out(llama, split):
    h = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    h[:, 0] *= 100  # a sink
    skipped = {"score.skip_first": True}
    assert torch.allclose(_seen(llama, skipped, h, split), h[0, 1:].square().mean(0), rtol=1e-4)
    # where it is the only one, it still has an order to give
    assert _seen(llama, skipped, h[:, :1]).argmax() == h[0, 0].abs().argmax()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_gains_are_the_norms_factors(family):
    model = tiny(family).float()
    norm = final_norm(model)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    weight = norm.weight.float()
    wanted = 1 + weight if family == "gemma3" else weight
    assert torch.allclose(gain(norm, 32), wanted.detach(), atol=1e-3)


def test_without_a_norm_the_gain_is_one():
    assert torch.equal(gain(None, 4), torch.ones(4))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_the_projection_is_that_of_the_output_head(monkeypatch, chunk):
    """Untied, with a norm after the FFN and a final norm: Phi by explicit matrices."""
    monkeypatch.setattr("dart_eval.pruning.calibration.vocabulary.CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter))
    ffn, found = find_ffns(model)[1], project(model, find_ffns(model))[1]
    layer = model.model.layers[1]
    gains = (1 + layer.post_feedforward_layernorm.weight) * (1 + model.model.norm.weight)
    phi = (model.lm_head.weight @ (gains[:, None] * ffn.down.weight)).abs()  # [V, F]
    assert torch.allclose(found.largest, phi.max(0).values, rtol=1e-3)
    assert torch.allclose(found.mean, phi.mean(0), rtol=1e-3)
    head = model.lm_head.weight
    assert not torch.allclose(head, model.get_input_embeddings().weight)


def test_scores_with_the_projection(llama):
    """Each ranking as the public code names it, in its own form: a factor on the norm of a neuron's activations."""
    calibration = Calibration(llama, None)
    largest, mean = (getattr(calibration.projection()[0], n).double() for n in ("largest", "mean"))
    h = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(2))
    norm = h[0].double().norm(dim=0)
    down = find_ffns(llama)[0].output_weight().double().norm(dim=0)
    wanted = {
        "none": norm, "max": largest * norm, "mean": mean * norm, "combined": (largest + mean) * norm,
        "product": largest * mean * norm**2,
    }  # fmt: skip
    for vocabulary, value in wanted.items():
        for down_norm in (False, True):
            params = {"score.vocabulary": vocabulary, "score.down_norm": down_norm, "allocation": "uniform"}
            state = state_of("dart", llama, calibration=calibration, **params)
            valid = torch.ones(1, 9, dtype=torch.bool)
            for layer in range(3):
                state.observe(layer, h, valid)
            state.finish_context(valid)
            full = value * down if down_norm and vocabulary != "product" else value * down**2 if down_norm else value
            assert set(state.masks[0][0].nonzero().flatten().tolist()) == set(full.topk(20).indices.tolist())


def test_factors_beside_an_average_of_magnitudes_are_those_of_a_norm(llama):
    """Beside sums of squares they are squared."""
    calibration = Calibration(llama, None)
    largest, down = calibration.projection()[1].largest, find_ffns(llama)[1].output_weight().float().norm(dim=0)
    for average, power in (("l2", 2), ("ema", 1)):
        score = Activation(average=average, vocabulary="max", down_norm=True)
        assert torch.allclose(score.factors(calibration)[1], (largest * down) ** power, rtol=1e-4)


def test_random_neurons_differ_from_layer_to_layer_and_from_seed_to_seed(llama):
    calibration = Calibration(llama, None)
    first, again, other = (Random(seed=seed).factors(calibration) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a in first for b in other)
