"""What is shipped around the package: the action's steps run; no script has a value pasted into it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import ROOT, command

BIN = Path(sys.executable).parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


@pytest.mark.process
@pytest.mark.slow
def test_the_action_runs_passes_and_fails_with_the_check(saved_llama, tmp_path):
    """By bash, its inputs in the environment, as a runner does; a file's name would break a script."""

    def step(name, **given):
        values = {f"inputs.{key}": given.get(key, field.get("default")) for key, field in ACTION["inputs"].items()}
        values["github.action_path"] = str(ROOT)
        (found,) = [s for s in ACTION["runs"]["steps"] if s.get("name") == name]
        env = {key: re.sub(r"\$\{\{ (\S+) \}\}", lambda m: values[m[1]], value) for key, value in found["env"].items()}
        env |= {"PATH": f"{BIN}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", found["run"]]
        return subprocess.run(words, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)

    config = "a $(touch pasted).yaml"
    options = {"model": saved_llama, "tasks": "smoke_questions", "method": ["dense", "griffin"], "limit": 4}
    (tmp_path / config).write_text(yaml.safe_dump(options))
    ran = step("Run", config=config, args="--limit 3\n--sparsity 0.4\n")
    assert ran.returncode == 0, ran.stderr
    results = tmp_path / ACTION["inputs"]["output"]["default"]
    assert command("check", results, "--baseline", tmp_path / "base line.json", "--update").code == 0
    checked = step("Check", config=config, baseline="base line.json")
    assert checked.returncode == 0 and (results / "junit.xml").is_file(), checked.stderr
    next(file for file in (results / "cells").glob("*.json") if "griffin" in file.name).unlink()
    failed = step("Check", config=config, baseline="base line.json")
    assert failed.returncode == 1 and "::error" in failed.stdout and not (tmp_path / "pasted").exists()


def test_no_script_of_ours_has_a_value_pasted_into_it():
    """What a pull request can choose reaches a shell through its environment alone, and a workflow may only read."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    workflows = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in workflows)
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    scripts = [s["run"] for part in (*jobs, ACTION["runs"]) for s in part["steps"] if "run" in s]
    assert len(scripts) >= 9 and not [script for script in scripts if re.search(r"\$\{\{ (?!matrix)", script)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert {name for script in scripts for name in re.findall(r"^make ([\w-]+)", script, flags=re.M)} <= targets
