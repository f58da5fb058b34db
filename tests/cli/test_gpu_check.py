"""`make gpu-check` on a CPU: a check that fails stands alone, a wrong product is seen, a small card has less to do."""

import json
import os
import sys
import time

import pytest
import torch

from dart_eval.kernels import mask_rows
from tests.helpers.commands import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module; what importing it sets is undone."""
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    import gpu_check

    yield gpu_check
    sys.modules.pop("gpu_check")


@pytest.mark.process
def test_a_check_that_fails_stands_alone(script, tmp_path, monkeypatch):
    def broken(dry):
        raise RuntimeError("first line\nsecond line")

    def absent(dry):
        raise script.Skip("no such thing here")

    checks = {
        "broken": (broken, 60, "failed"), "endless": (lambda dry: time.sleep(600), 0.2, "failed"),
        "killed": (lambda dry: os._exit(9), 60, "failed"), "absent": (absent, 60, "skipped"),
        "fine": (lambda dry: {"said": "all is well"}, 60, "passed"),
    }  # fmt: skip
    for name, (check, _, _) in checks.items():
        monkeypatch.setattr(script, name, check, raising=False)
    monkeypatch.setattr(script, "LIMITS", {name: limit for name, (_, limit, _) in checks.items()})
    output = ["--dry", "--output", str(tmp_path)]
    assert script.main([*output, "--only", ",".join(checks)]) == 1
    report = json.loads((tmp_path / "CPU-dry.json").read_text())
    assert {check["check"]: check["status"] for check in report["checks"]} == {n: c[2] for n, c in checks.items()}
    assert script.main([*output, "--only", "absent,fine"]) == 0
    assert script.main([*output, "--only", "fien"]) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert script.main(["--output", str(tmp_path)]) == 2


def test_a_wrong_product_is_seen(script, monkeypatch):
    """Down without two of its columns: the executions are told apart."""
    taken = mask_rows.Slot.taken

    def short(slot, neurons):
        part = taken(slot, neurons)
        if slot.dim == 1:
            part[:, -2:] = 0
        return part

    monkeypatch.setattr(mask_rows.Slot, "taken", short)
    with pytest.raises(AssertionError, match="griffin"):
        script.executions(dry=True)


def test_a_small_card_gets_fewer_layers(script, monkeypatch):
    made = []
    monkeypatch.setattr(script.shapes, "with_random_weights", lambda *args: made.append(args))
    for free, layers in ((80e9, 32), (24e9, 21), (8e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        script.large(dry=False)
        assert made[-1][1] == layers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6e9, 6e9))
    with pytest.raises(script.Skip):
        script.large(dry=False)
