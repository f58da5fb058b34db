"""The drift detector's bookkeeping. What it is meant to do: tests/derivations/test_dart_drift.py."""

import pytest
import torch

from dart_eval.pruning.methods.drift import MAX_REFERENCE_WINDOWS, DriftDetector, DriftSettings

D = 6
CPU = torch.device("cpu")
DEFAULT = DriftSettings(window=10, sigma=0.5, floor=0.1, patience=2, cooldown=2, min_windows=4, recent=2)


def test_a_sequence_that_ended_raises_no_alarm():
    config = DEFAULT._replace(window=4, patience=1, floor=-3.0, sigma=-1000.0)  # every full window is flagged
    detector = DriftDetector(config, 2, D, CPU)
    detector.observe(torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool))
    detector.set_reference()
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert detector.update(torch.randn(2, 4, D), valid).tolist() == [True, False]
    assert detector.room() == 4


def test_rebase_moves_the_reference_to_the_latest_windows_of_that_sequence_only():
    config = DEFAULT._replace(window=2, recent=2)
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


def test_a_prompt_in_chunks_closed_each_time_makes_the_same_reference():
    """Chunked prefill: every chunk ends with `set_reference`, and the next one goes on where it stopped."""
    a, valid = torch.randn(1, 47, D), torch.ones(1, 47, dtype=torch.bool)
    whole, parts = (DriftDetector(DEFAULT._replace(window=5), 1, D, CPU) for _ in range(2))
    whole.observe(a, valid)
    whole.set_reference()
    for part in torch.arange(47).split(8):
        parts.observe(a[:, part], valid[:, part])
        parts.set_reference()
    assert torch.allclose(whole.threshold, parts.threshold, atol=1e-6)
    assert torch.allclose(whole.reference, parts.reference, atol=1e-6)
    assert len(parts.windows[0]) == len(whole.windows[0]) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_attention_outputs_are_kept_in_fp32(dtype):
    """Their sum over a prompt, and that over a window, are beyond float16 and between two numbers of bfloat16."""
    detector = DriftDetector(DEFAULT._replace(window=250), 1, D, CPU)
    a, valid = torch.full((1, 500, D), 300.0, dtype=dtype), torch.ones(1, 500, dtype=torch.bool)
    a[..., 1] = 302.0
    detector.observe(a, valid)
    detector.set_reference()
    wanted = a[0, 0].float()
    assert torch.allclose(detector.reference[0], wanted, rtol=1e-5)
    detector.update(a[:, :250], valid[:, :250])
    assert torch.allclose(detector.recent[0, -1], wanted, rtol=1e-5)


def test_of_a_long_prompt_the_latest_windows_set_the_threshold():
    """The first six of seventy windows point elsewhere: only the mean of all has them."""
    a = torch.ones(1, MAX_REFERENCE_WINDOWS + 6, D)
    a[0, :6, 0] = -9.0
    detector = DriftDetector(DEFAULT._replace(window=1, floor=0.1), 1, D, CPU)
    detector.observe(a, torch.ones(a.shape[:2], dtype=torch.bool))
    detector.set_reference()
    alike = torch.cosine_similarity(a[0, -1], a[0].mean(0), dim=0)
    assert float(detector.threshold[0]) == pytest.approx(float(alike) - 0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("patience", "cooldown", "before", "after"), [(2, 0, [False], [False, True]), (1, 3, [True, False], [True, False])]
)
def test_a_further_turn_begins_without_flags_and_without_a_cool_down(patience, cooldown, before, after):
    """All windows are flagged."""
    config = DEFAULT._replace(window=2, sigma=-1000.0, floor=-3.0, patience=patience, cooldown=cooldown)
    detector, two = DriftDetector(config, 1, D, CPU), torch.ones(1, 2, dtype=torch.bool)
    for alarms in (before, after):
        detector.observe(torch.randn(1, 8, D), torch.ones(1, 8, dtype=torch.bool))
        detector.set_reference()
        assert [bool(detector.update(torch.randn(1, 2, D), two)) for _ in alarms] == alarms


def test_as_many_windows_as_asked_for_are_enough_to_trust_their_deviation():
    config = DEFAULT._replace(window=2, sigma=3.0, floor=0.0, min_windows=4)
    for tokens, trusted in ((6, 0), (8, 1)):
        detector = DriftDetector(config, 1, D, CPU)
        detector.observe(torch.randn(1, tokens, D), torch.ones(1, tokens, dtype=torch.bool))
        detector.set_reference()
        assert float(detector.deviation) > 0
        assert float(detector.threshold) == pytest.approx(float(detector.mean - trusted * 3 * detector.deviation))


def test_windows_of_a_sequence_that_runs_dense_are_none_of_the_cool_down():
    config = DEFAULT._replace(window=2, sigma=-1000.0, floor=-3.0, patience=1, cooldown=1)  # all are flagged
    detector, two = DriftDetector(config, 1, D, CPU), torch.ones(1, 2, dtype=torch.bool)
    detector.observe(torch.randn(1, 8, D), torch.ones(1, 8, dtype=torch.bool))
    detector.set_reference()
    alarms = [bool(detector.update(torch.randn(1, 2, D), two, torch.tensor([bool(hold)]))) for hold in (0, 1, 1, 0, 0)]
    assert alarms == [True, False, False, False, True]


def test_a_reference_moves_to_windows_of_its_own_turn():
    """It goes by four windows, and those of the turn before fill three: an early alarm does not look back at them."""
    config, axes = DEFAULT._replace(window=2, recent=4, patience=1, floor=0.01, min_windows=1), torch.eye(D)
    detector = DriftDetector(config, 1, D, CPU)
    for turn in range(2):
        detector.observe(axes[0].expand(1, 8, D), torch.ones(1, 8, dtype=torch.bool))
        detector.set_reference()
        for _ in range(3 if turn == 0 else 0):
            detector.update(axes[0].expand(1, 2, D), torch.ones(1, 2, dtype=torch.bool))
    alarm = detector.update(axes[1].expand(1, 2, D), torch.ones(1, 2, dtype=torch.bool))
    detector.rebase(alarm)
    assert bool(alarm) and torch.equal(detector.reference[0] / detector.reference.norm(), axes[1])
