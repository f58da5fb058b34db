"""scripts/format_errors.py: a grid that fits the file's loses nothing, and one off the grid what others lose."""

import pytest
import torch
from safetensors.torch import load_file

from dart_eval.weights import gguf
from scripts import format_errors
from tests.helpers.gguf_files import write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    return gguf.folder(write(tmp_path / "tiny.gguf"))  # gate and up in Q4_0, down in Q8_0


def test_only_weights_of_a_file_are_near_its_grid(folder):
    torch.manual_seed(0)
    found = format_errors.measure(folder, rows=32)
    assert set(found) == {"Q4_0", "Q8_0", "all"}
    own, filled, normal = (found["Q4_0"][sort] for sort in ("own", "filled in", "Gaussian"))
    assert own["4"] < 1e-4 < own["3"] / 100  # 4 bits in groups of 32 are Q4_0's grid, up to 16-bit values
    assert own["5"] < 1e-4, "every second step of 5 bits is one of 4"
    assert 0.8 < filled["4"] / normal["4"] < 1.25 and filled["4"] / own["4"] > 50
    assert own["first 2 of 8:128"] > own["first 4 of 8:128"] > own["8:128"] > 0
    assert found["all"]["own"]["4"] > own["4"]
    assert format_errors.table(found["all"]).count("\n") == 1 + len(own)


def test_a_filled_model_has_weights_that_its_codes_stand_for(folder, tmp_path):
    format_errors.fill(folder, tmp_path / "filled")
    before, after = (load_file(place / format_errors.WEIGHTS) for place in (folder, tmp_path / "filled"))
    steps = {name: step for name, _, _, step in format_errors.matrices(folder)}
    assert len(steps) == 6 and before.keys() == after.keys() and not (tmp_path / "filled" / gguf.KINDS).exists()
    for name, weights in after.items():
        away = (weights - before[name]).abs()
        if name not in steps:
            assert not away.any()
            continue
        assert (away <= 0.5001 * steps[name]).all()
        assert 0.2 < float((away / steps[name].clamp_min(1e-9)).mean()) < 0.3, (
            "half a step at most, a quarter in the mean"
        )


def test_a_model_without_codes_is_never_filled_in(tmp_path):
    weights = {
        "encoder.layer.0.intermediate.dense.weight": torch.randn(8, 256),
        "pooler.dense.weight": torch.ones(2, 2),
    }
    format_errors.save_file(weights, tmp_path / format_errors.WEIGHTS)
    found = format_errors.measure(tmp_path, rows=8)
    assert set(found) == {"all"} and found["all"]["own"] == found["all"]["filled in"]
