"""Scores by hand: normalisation and aggregation."""

import pytest
import torch

from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.masks.scores import Random, activations
from tests.helpers.sessions import state_of


@pytest.mark.parametrize("norm", ["none", "l1", "l2"])
def test_sums_of_activations_by_hand(norm):
    torch.manual_seed(0)
    h, weight = torch.randn(2, 5, 7), torch.rand(2, 5)
    weight[0, 0] = 0
    for row in range(2):
        wanted = torch.zeros(7)
        for t in range(5):
            token = h[row, t]
            size = {"none": 1, "l1": token.abs().sum(), "l2": token.norm()}[norm]
            wanted += weight[row, t] * (token.abs() / size) ** 2
        assert torch.allclose(activations(h, weight, norm)[row], wanted, rtol=1e-5)


def test_a_token_without_activations_counts_nothing():
    assert torch.equal(activations(torch.zeros(1, 2, 3), torch.ones(1, 2), "l2"), torch.zeros(1, 3))


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


@pytest.mark.parametrize("split", [1, 4])
def test_a_score_does_not_see_the_pieces_of_a_context(llama, split):
    h = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    whole, parts = (_state_after(llama.float(), {}, h, at).layers[0].sums for at in (None, split))
    assert torch.allclose(whole, parts) and torch.allclose(whole[0], h[0].square().sum(0))


def test_random_neurons_differ_from_layer_to_layer_and_from_seed_to_seed(llama):
    calibration = Calibration(llama, None)
    first, again, other = (Random(seed=seed).factors(calibration) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a in first for b in other)
