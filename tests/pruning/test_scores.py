"""Scores by hand: sums over tokens, and random ones."""

import pytest
import torch

from dart_eval.pruning.methods.griffin import relative_squares, squares
from tests.helpers.sessions import RandomCalibration, rows_of


@pytest.mark.parametrize("observe", [squares, relative_squares])
def test_sums_of_activations_by_hand(observe):
    torch.manual_seed(0)
    h, weight = torch.randn(2, 5, 7), torch.rand(2, 5)
    weight[0, 0] = 0
    for row in range(2):
        wanted = torch.zeros(7)
        for t in range(5):
            token = h[row, t]
            wanted += weight[row, t] * (token.abs() / (1 if observe is squares else token.norm())) ** 2
        assert torch.allclose(observe(h, weight)[row], wanted, rtol=1e-5)


def test_a_token_without_activations_counts_nothing():
    assert torch.equal(relative_squares(torch.zeros(1, 2, 3), torch.ones(1, 2)), torch.zeros(1, 3))


@pytest.mark.parametrize("split", [1, 4])
def test_a_score_does_not_see_the_pieces_of_a_context(llama, split):
    h = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    method, _ = rows_of("dart", llama)
    whole, sums = method.add(None, method.ffns[0], h, torch.ones(1, 7)), None
    for part in (h[:, :split], h[:, split:]):
        sums = method.add(sums, method.ffns[0], part, torch.ones(part.shape[:2]))
    assert torch.allclose(whole, sums) and torch.allclose(whole[0], h[0].square().sum(0))


def test_random_neurons_differ_from_layer_to_layer_and_from_seed_to_seed(llama):
    calibration = RandomCalibration(llama)
    methods = (rows_of("random", llama, calibration=calibration, **{"score.seed": seed})[0] for seed in (1, 1, 2))
    first, again, other = (method.scores(calibration) for method in methods)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a in first for b in other)
