"""The drift detector against a plain reading of its definition, and its bookkeeping."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.pruning.drift import MAX_REFERENCE_WINDOWS, DriftConfig, DriftDetector

D = 6
CPU = torch.device("cpu")


def _cos(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _naive(prompt, decoded, config):
    """(threshold, windows at whose end an alarm is raised) by the definition, one sequence, no rebase."""
    if not len(prompt):
        return -np.inf, []
    base = prompt.mean(0)
    k = len(prompt) // config.window
    windows = [prompt[i * config.window : (i + 1) * config.window].mean(0) for i in range(k)][-MAX_REFERENCE_WINDOWS:]
    if not windows:
        return -np.inf, []
    s = np.array([_cos(w, base) for w in windows])
    margin = config.floor
    if len(s) >= max(config.min_windows, 2):
        margin = max(config.sigma * s.std(ddof=1), config.floor)
    threshold = s.mean() - margin
    pressure = cooling = 0
    alarms = []
    for i in range(len(decoded) // config.window):
        flagged = _cos(decoded[i * config.window : (i + 1) * config.window].mean(0), base) < threshold
        if cooling:
            cooling -= 1
            continue
        pressure = pressure + 1 if flagged else max(0, pressure - 1)
        if pressure >= config.patience:
            alarms.append(i)
            pressure, cooling = 0, config.cooldown
    return threshold, alarms


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 60), st.integers(1, 7), st.integers(1, 3),
    st.integers(0, 3), st.integers(0, 9),
)  # fmt: skip
def test_alarms_equal_the_definition(seed, prompt_len, decoded_len, window, patience, cooldown, pad):
    rng = np.random.default_rng(seed)
    config = DriftConfig(window=window, sigma=0.5, floor=0.05, patience=patience, cooldown=cooldown)
    prompt = rng.normal(size=(prompt_len, D)) + 2
    decoded = rng.normal(size=(decoded_len, D)) + rng.choice([0.0, 2.0])
    threshold, wanted = _naive(prompt, decoded, config)
    detector = DriftDetector(config, 2, D, CPU)
    # row 0: the sequence behind left padding that holds nonsense; row 1: something else
    padded = np.concatenate([np.full((pad, D), np.nan), prompt])
    a = torch.tensor(np.stack([padded, rng.normal(size=padded.shape)])).float()
    valid = torch.ones(2, prompt_len + pad, dtype=torch.bool)
    valid[0, :pad] = False
    for part in torch.arange(prompt_len + pad).split(13):  # chunks must not matter
        detector.observe(a[:, part], valid[:, part])
    detector.set_reference()
    assert float(detector.threshold[0]) == pytest.approx(threshold, abs=1e-4)
    alarms, start = [], 0
    while start < decoded_len:
        step = min(detector.room(), decoded_len - start)
        token = torch.tensor(np.stack([decoded[start : start + step]] * 2)).float()
        if bool(detector.update(token, torch.ones(2, step, dtype=torch.bool))[0]):
            alarms.append((start + step) // window - 1)
        start += step
    assert alarms == wanted


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
