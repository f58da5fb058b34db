"""`make gpu-check` on a CPU: what it would do on a GPU, on tiny shapes; a check that fails stands alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import program

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
# What the project installs beside torch, transformers and accelerate, and a plain CUDA image does not have.
ABSENT = (
    "lm_eval", "typer", "rich", "datasets", "evaluate", "ray", "matplotlib", "scipy", "sacrebleu", "rouge_score",
    "gguf", "hypothesis",
)  # fmt: skip
# The checks as a user starts them; then what the core is made of, in the same process: one is slow enough to start.
CODE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv[0] = {str(SCRIPT)!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code
import dart_eval, dart_eval.bench.shapes
print("core:", dart_eval.prune, *dart_eval.methods())
sys.exit(status)
"""


@pytest.mark.process
@pytest.mark.slow
def test_dry_in_a_plain_image(tmp_path):
    """Torch and transformers are enough: every check runs or says why not; the file has the card and the numbers."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, "--dry", "--output", str(tmp_path)], cwd=ROOT, capture_output=True,
        text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    core = done.stdout.splitlines()[-1]
    assert core.startswith("core: ") and "griffin" in core.split()
    report = json.loads((tmp_path / "CPU-dry.json").read_text())
    assert (report["card"], report["dry"]) == ("CPU (dry)", True)
    status = {check["check"]: (check["status"], check.get("why")) for check in report["checks"]}
    assert status.pop("column") == ("skipped", "lm_eval is not installed (pip install -e .)")
    assert status == dict.fromkeys(("parity", "executions", "rate", "scoring", "decoding"), ("passed", None))
    numbers = {check["check"]: check["numbers"] for check in report["checks"]}
    assert 0 < numbers["parity"]["bfloat16"] < 0.05 < numbers["parity"]["bfloat16 pruning moves"]
    rows = numbers["decoding"]["rows"]
    assert [row["method"] for row in rows] == ["griffin", "dart"]
    assert all(row["memory"] < row["twin_bytes"] / 2 for row in rows)


@pytest.mark.process
def test_without_a_gpu_one_line():
    done = program(script=SCRIPT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA GPU is at hand; --dry") and done.stderr.count("\n") == 1


@pytest.mark.process
@pytest.mark.slow
def test_a_column_of_a_table_with_a_given_model(saved_llama, tmp_path):
    """Dry with a model is the column that a GPU makes, on a CPU; its cells are kept, and found again."""
    words = ("--dry", "--only", "column", "--task", "smoke_questions", "--limit", "3", "--output", str(tmp_path))
    done = program(*words, "--model", saved_llama, script=SCRIPT)
    assert done.returncode == 0, done.stdout
    (check,) = json.loads((tmp_path / "CPU-dry.json").read_text())["checks"]
    assert {row["method"] for row in check["numbers"]["rows"]} == {"dense", "griffin", "dart", "grinqh"}
    assert "smoke_questions x 3, acc: dense 0." in " ".join(done.stdout.split())
    assert len([*(tmp_path / "column" / "out" / "cells").iterdir()]) == 4
    absent = program(*words, "--model", "nowhere/at-all", script=SCRIPT)
    assert absent.returncode == 0 and "column     skipped" in absent.stdout


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
def test_a_check_that_fails_stands_alone(script, tmp_path, monkeypatch, capfd):
    def endless(dry):
        time.sleep(600)

    def broken(dry):
        raise RuntimeError("first line\nsecond line")

    def killed(dry):
        os._exit(9)

    def fine(dry):
        return {"said": "all is well"}

    def absent(dry):
        raise script.Skip("no such thing here")

    for check in (broken, endless, killed, absent, fine):
        monkeypatch.setattr(script, check.__name__, check, raising=False)
    monkeypatch.setattr(script, "LIMITS", {"broken": 60, "endless": 0.2, "killed": 60, "absent": 60, "fine": 60})
    output = ["--dry", "--output", str(tmp_path)]
    assert script.main([*output, "--only", "broken,endless,killed,absent,fine"]) == 1
    report = json.loads((tmp_path / "CPU-dry.json").read_text())
    assert {check["check"]: (check["status"], check.get("why")) for check in report["checks"]} == {
        "broken": ("failed", "RuntimeError: first line second line"),
        "endless": ("failed", "it ran over its 0 s"),
        "killed": ("failed", "its process ended with status 9"),
        "absent": ("skipped", "no such thing here"),
        "fine": ("passed", None),
    }
    assert "1 passed, 3 failed, 1 skipped" in capfd.readouterr().out
    assert script.main([*output, "--only", "absent,fine"]) == 0
    assert script.main([*output, "--only", "fien"]) == 2


def test_a_wrong_product_is_seen(script, monkeypatch):
    """Down without two of its columns: the executions are told apart."""
    from dart_eval.kernels import mask_rows

    taken = mask_rows.Slot.taken

    def short(slot, neurons):
        part = taken(slot, neurons)
        if slot.dim == 1:
            part[:, -2:] = 0
        return part

    monkeypatch.setattr(mask_rows.Slot, "taken", short)
    with pytest.raises(AssertionError, match="griffin float32, copied and masked"):
        script.executions(dry=True)


def test_a_small_card_gets_fewer_layers(script, monkeypatch):
    made = []
    monkeypatch.setattr(script.shapes, "with_random_weights", lambda *args: made.append(args))
    for free, layers in ((80e9, 32), (24e9, 21), (8e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        script.large(dry=False)
        assert made[-1][1] == layers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6e9, 6e9))
    with pytest.raises(script.Skip, match="do not hold one layer"):
        script.large(dry=False)
