"""Effective sparsity by hand: blocks, and what a batch computes for a sequence that has ended."""

import pytest
import torch

from dart_eval.pruning.log import Tally


def test_every_token_of_a_block_counts():
    tally = Tally()
    tally.context(1, False)
    tally.decode(torch.tensor([0.5]), 3)
    tally.decode(torch.tensor([1.0]), 1)
    assert tally.share == pytest.approx(3 * 0.5 / 5)


def test_what_comes_after_an_end_counts_as_soon_as_something_follows():
    tally, half = Tally(), torch.tensor([0.5, 0.5])
    tally.context(2, False)
    tally.decode(half, 1)
    for _ in range(2):
        tally.decode(half, 1, torch.tensor([True, False]))
    assert tally.share == pytest.approx((1 + 3) * 0.5 / 6)
    tally.decode(half, 1, torch.tensor([False, False]))
    assert tally.share == pytest.approx((4 + 4) * 0.5 / 10)


def test_a_token_without_word_of_its_end_goes_on():
    tally, half = Tally(), torch.tensor([0.5])
    tally.context(1, False)
    tally.decode(half, 1, torch.tensor([True]))
    assert tally.share == 0
    tally.decode(half, 1)
    assert tally.share == pytest.approx(2 * 0.5 / 3)


def test_the_first_token_of_every_context_counts():
    tally = Tally()
    for _ in range(2):
        tally.context(1, False)
        tally.decode(torch.tensor([0.5]), 1)
    assert tally.share == pytest.approx(2 * 0.5 / 4)
    tally.context(1, True)  # a chunk of the same prompt
    assert tally.share == pytest.approx(2 * 0.5 / 4)
