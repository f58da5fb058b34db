"""The drift detector's bookkeeping. What it is meant to do: tests/derivations/test_dart_drift.py."""

import torch

from dart_eval.pruning.drift import DriftConfig, DriftDetector

D = 6
CPU = torch.device("cpu")


def test_a_sequence_that_ended_raises_no_alarm():
    config = DriftConfig(window=4, patience=1, floor=-3.0, sigma=0.0)  # every full window is flagged
    detector = DriftDetector(config, 2, D, CPU)
    detector.observe(torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool))
    detector.set_reference()
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert detector.update(torch.randn(2, 4, D), valid).tolist() == [True, False]
    assert detector.room() == 4


def test_rebase_moves_the_reference_to_the_latest_windows_of_that_sequence_only():
    config = DriftConfig(window=2, recent=2)
    detector = DriftDetector(config, 2, D, CPU)
    detector.observe(torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool))
    detector.set_reference()
    before = detector.reference.clone()
    a = torch.randn(2, 4, D)
    for part in (a[:, :2], a[:, 2:]):
        detector.update(part, torch.ones(2, 2, dtype=torch.bool))
    detector.rebase(torch.tensor([True, False]))
    assert torch.allclose(detector.reference[0], a[0].mean(0), atol=1e-6)
    assert torch.equal(detector.reference[1], before[1])


def test_a_copy_is_independent():
    detector = DriftDetector(DriftConfig(window=2), 2, D, CPU)
    detector.observe(torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool))
    detector.set_reference()
    copy = detector.select(torch.tensor([1, 1, 0]))
    before = detector.window_sum.clone()
    copy.update(torch.randn(3, 1, D), torch.ones(3, 1, dtype=torch.bool))
    assert torch.equal(detector.window_sum, before)
    assert torch.equal(copy.threshold, detector.threshold[[1, 1, 0]])


def test_memory_does_not_grow_with_the_prompt():
    sizes = []
    for tokens in (2_000, 20_000):
        detector = DriftDetector(DriftConfig(), 1, D, CPU)
        detector.observe(torch.randn(1, tokens, D), torch.ones(1, tokens, dtype=torch.bool))
        sizes.append(detector.nbytes())
    assert sizes[0] == sizes[1]


def test_a_prompt_in_chunks_closed_each_time_makes_the_same_reference():
    """Chunked prefill: every chunk ends with `set_reference`, and the next one goes on where it stopped."""
    a, valid = torch.randn(1, 47, D), torch.ones(1, 47, dtype=torch.bool)
    whole, parts = (DriftDetector(DriftConfig(window=5), 1, D, CPU) for _ in range(2))
    whole.observe(a, valid)
    whole.set_reference()
    for part in torch.arange(47).split(8):
        parts.observe(a[:, part], valid[:, part])
        parts.set_reference()
    assert torch.allclose(whole.threshold, parts.threshold, atol=1e-6)
    assert torch.allclose(whole.reference, parts.reference, atol=1e-6)
    assert len(parts.windows[0]) == len(whole.windows[0]) == 9
