"""scripts/format_errors.py: a grid that fits the file's loses nothing, and one off the grid what others lose."""

import torch

from dart_eval.weights import gguf
from scripts import format_errors
from tests.helpers import gguf_files


def test_only_weights_of_a_file_are_near_its_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "KINDS", dict.fromkeys(gguf_files.KINDS, "Q4_0"))
    torch.manual_seed(0)
    found = format_errors.measure(gguf.folder(gguf_files.write(tmp_path / "tiny.gguf")), rows=32)
    own, normal = found["own"], found["Gaussian"]
    assert own["4"] < 1e-4 < own["3"] / 100  # 4 bits in groups of 32 are Q4_0's grid, up to 16-bit values
    assert own["5"] < 1e-4, "every second step of 5 bits is one of 4"
    assert normal["4"] / own["4"] > 50
    assert own["first 2 of 8:128"] > own["first 4 of 8:128"] > own["8:128"] > 0
    assert format_errors.table(found).count("\n") == 1 + len(own)
