"""`make gpu-check` on a CPU: what it would do on a GPU, on tiny shapes; a check that fails stands alone."""

import json
import os
import re
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
PLAIN = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"


# The checks as a user starts them; then what the core is made of, in the same process: one is slow enough to start.
CODE = """
import runpy
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code
import dart_eval, dart_eval.pruning.prune, dart_eval.bench.decode, dart_eval.models.shapes
import dart_eval.evaluation.scoring, dart_eval.evaluation.forwards
print("core:", dart_eval.prune, *dart_eval.methods())
sys.exit(status)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """All checks on a CPU in a process that has what a plain image has: its standard output and the report."""
    folder = tmp_path_factory.mktemp("plain")
    begin = PLAIN + f"sys.argv[0] = {str(SCRIPT)!r}" + CODE
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", begin, "--dry", "--output", str(folder)], cwd=ROOT, capture_output=True,
        text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "CPU-dry.json").read_text())


@pytest.mark.process
@pytest.mark.slow
def test_the_core_needs_torch_and_transformers_alone(plain):
    said = plain[0].splitlines()[-1]
    assert said.startswith("core: ") and "griffin" in said.split()


@pytest.mark.process
@pytest.mark.slow
def test_dry_in_a_plain_image(plain):
    """Every check runs or says why not; the file has the card's name and the numbers."""
    said, report = plain
    found = {check["check"]: check for check in report["checks"]}
    skipped = {name: check["why"] for name, check in found.items() if check["status"] == "skipped"}
    assert (report["card"], report["dry"]) == ("CPU (dry)", True)
    for name in ("sweep", "column"):
        assert skipped.pop(name) == "lm_eval is not installed (pip install -e .)"
    on_gpus = {"flash", "graphs", "decode_graph", "decode_compiled"}
    assert set(skipped) <= on_gpus
    assert {name for name, check in found.items() if check["status"] == "passed"} >= {
        "parity", "executions", "rate", "ffn", "scoring", "decode_eager", "compile",
    }  # fmt: skip
    assert (
        0 < found["parity"]["numbers"]["bfloat16 pruned"] < 0.05 < found["parity"]["numbers"]["bfloat16 pruning moves"]
    )
    rows = found["decode_eager"]["numbers"]["rows"]
    assert [row["method"] for row in rows][:2] == ["griffin", "dart"]
    one = {r["what"]: r for r in found["ffn"]["numbers"]["speeds"]}
    assert one["dense"]["share"] == 1 and one["griffin 70 %"]["ceiling"] == pytest.approx(1 / 0.3)
    assert all(row["extra_weight_bytes"] < row["twin_bytes"] / 2 for row in rows)
    assert "passed" in said and "griffin" in said


@pytest.mark.process
def test_without_a_gpu_one_line():
    done = program(script=SCRIPT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA GPU is at hand; --dry") and done.stderr.count("\n") == 1


@pytest.mark.process
@pytest.mark.slow
def test_a_small_sweep_where_lm_eval_is_there():
    done = program("--dry", "--only", "sweep", script=SCRIPT)
    assert done.returncode == 0, done.stdout
    assert "sweep           passed" in done.stdout and "3 cells" in done.stdout


@pytest.mark.process
@pytest.mark.slow
def test_a_column_of_a_table_with_a_given_model(saved_llama, tmp_path):
    """Dry with a model is the column that a GPU makes, on a CPU; its cells are kept, and found again."""
    words = ("--dry", "--only", "column", "--model", saved_llama, "--task", "smoke_questions", "--limit", "3")
    done = program(*words, "--output", str(tmp_path), script=SCRIPT)
    assert done.returncode == 0, done.stdout
    (check,) = json.loads((tmp_path / "CPU-dry.json").read_text())["checks"]
    assert [row["method"] for row in check["numbers"]["column"]][:2] == ["dense", "dart"]
    assert "on 3 documents of smoke_questions:" in " ".join(done.stdout.split())
    assert re.search(r"^  grinqh        0\.\d\d      0\.\d{3} ", done.stdout, re.M)
    assert len([*(tmp_path / "column" / "out" / "cells").iterdir()]) == 4
    absent = program(*words[:4], "nowhere/at-all", script=SCRIPT)
    assert absent.returncode == 0 and "column          skipped" in absent.stdout


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with checks of ours; what importing it sets is undone."""
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    import gpu_check
    import gpu_checks

    def endless(dry):
        time.sleep(600)

    def broken(dry):
        raise RuntimeError("first line\nsecond line")

    def killed(dry):
        os._exit(9)

    def fine(dry):
        return {"said": "all is well"}

    def absent(dry):
        raise gpu_checks.Skip("no such thing here")

    monkeypatch.setattr(gpu_check, "prepare", lambda dry: None)
    for check in (broken, endless, killed, absent, fine):
        monkeypatch.setattr(gpu_checks, check.__name__, check, raising=False)
    monkeypatch.setattr(gpu_check, "LIMITS", {"broken": 60, "endless": 0.2, "killed": 60, "absent": 60, "fine": 60})
    yield gpu_check
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        sys.modules.pop(name)


@pytest.mark.process
def test_a_check_that_fails_stands_alone(script, tmp_path, capfd):
    assert script.main(["--dry", "--only", "broken,endless,killed,absent,fine", "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "CPU-dry.json").read_text())
    found = {check["check"]: (check["status"], check.get("why")) for check in report["checks"]}
    assert found == {
        "broken": ("failed", "RuntimeError: first line second line"),
        "endless": ("failed", "it ran over its 0 s"),
        "killed": ("failed", "its process ended with status 9"),
        "absent": ("skipped", "no such thing here"),
        "fine": ("passed", None),
    }
    assert "1 passed, 3 failed, 1 skipped" in capfd.readouterr().out
    assert script.main(["--dry", "--only", "absent,fine"]) == 0
    assert script.main(["--dry", "--only", "fien"]) == 2
    assert os.listdir(tmp_path) == ["CPU-dry.json"]


def test_a_wrong_product_is_seen(script, monkeypatch):
    """Down without two of its columns: the executions are told apart."""
    import gpu_checks

    from dart_eval.kernels import mask_rows

    copy = mask_rows.Slot.copy

    def short(slot, neurons):
        copy(slot, neurons)
        if slot.dim == 1:
            slot.part.data[:, -2:] = 0

    monkeypatch.setattr(mask_rows.Slot, "copy", short)
    with pytest.raises(AssertionError, match="griffin float32, copied and masked"):
        gpu_checks.executions(dry=True)


def test_more_minutes_are_more_time_for_every_check(script, monkeypatch, capfd):
    """Of 0.2 s that are too few, 300 times as many are enough."""
    import gpu_checks

    monkeypatch.setattr(gpu_checks, "endless", lambda dry: time.sleep(1) or {})
    assert script.main(["--dry", "--only", "endless"]) == 1
    assert script.main(["--dry", "--only", "endless", "--minutes", str(300 * script.MINUTES)]) == 0
    assert script.main(["--dry", "--only", "endless", "--minutes", "0"]) == 1
    assert "no time was left for it" in capfd.readouterr().out


def test_without_a_model_there_is_no_column(script):
    import gpu_column

    with pytest.raises(gpu_column.Skip, match='no model: give ARGS="--model FOLDER"'):
        gpu_column.column(False)


def test_the_tables_fit_80_columns(script):
    import gpu_speeds
    import gpu_tables

    control = {"control": 1.0}
    speeds = [gpu_speeds._row("dart-choice 70 %", "one FFN", 0.3, 3.1, 3.3, 2.8e12)]
    speeds.append({**gpu_speeds._row("dense on 8:row bits", "compiled", 0.5, 123.4, 1.4, 9e10), **control})
    cells = [{"method": "dense", "read": 1.0, "value": 0.81, "stderr": 0.039, "recovery": None, "n": 100}]
    cells.append({"method": "grinqh", "read": 0.3, "value": 0.79, "stderr": 0.041, "recovery": 0.97, "n": 100})
    column = {"model": "models/" + "m" * 60, "task": "arc_easy", "metric": "acc", "column": cells}
    numbers = {"rate": {"reads": 3.1e12}, "ffn": {"speeds": speeds, "absent": {"4:128, torch": "why " * 30}}}
    checks = [
        {"check": name, "status": "passed", "seconds": 12.0, "numbers": found}
        for name, found in {**numbers, "column": column}.items()
    ]
    checks.append({"check": "flash", "status": "failed", "seconds": 40.0, "why": "so long " * 40, "numbers": {}})
    said = gpu_tables.report({"card": "NVIDIA H100 80GB HBM3", "seconds": 400, "checks": checks})
    assert max(map(len, said.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert "dart-choice 70 % one FFN 0.30 3.10x 3.30x 94 % 90 % -" in rows
    assert "grinqh 0.30 0.790 97 % ±0.041" in rows
    assert "NVIDIA H100 80GB HBM3: 3 passed, 1 failed in 400 s" in said


def test_the_file_is_named_by_the_card(script, tmp_path):
    report = {"card": "NVIDIA H100 80GB HBM3 / ../x", "checks": []}
    assert script.save(report, tmp_path / "results").name == "NVIDIA-H100-80GB-HBM3-x.json"


def test_a_small_card_gets_fewer_layers(script, monkeypatch):
    import gpu_models

    made = []
    monkeypatch.setattr(gpu_models.shapes, "with_random_weights", lambda *args: made.append(args))
    for free, layers in ((80e9, 32), (24e9, 21), (8e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        about = gpu_models.large(dry=False)[1]
        assert about["layers"] == made[-1][1] == layers
        assert ("scaled_down" in about) == (layers < 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6e9, 6e9))
    with pytest.raises(gpu_models.Skip, match="do not hold one layer"):
        gpu_models.large(dry=False)
