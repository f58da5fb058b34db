"""`dart-eval run --executor ray` killed or stopped: nothing answered is lost, and the same command goes on."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.commands import program, results, started, until

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("quick_workers")]
# Those that Ray has its own ways with; the end of a terminal: test_resume.py.
STOPS = pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


def _command(folder, tmp_path, *more):
    return ("run", "--model", folder, "--output", tmp_path / "out", "--executor", "ray", *more)


def _kept(tmp_path):
    """Whether a batch has been answered."""
    return any(p.stat().st_size for p in (tmp_path / "out" / "partial").glob("*"))


def test_a_killed_driver_loses_nothing(saved_llama, tmp_path):
    """The first run is killed and leaves its cluster behind; the same command goes on."""
    sweep = ("--tasks", "smoke_questions,smoke_stories", "--method", "dense,griffin,dart", "--limit", "12")
    words = _command(saved_llama, tmp_path, *sweep, "--batch-size", "1")
    first = started(*words, session=True)
    cells = tmp_path / "out" / "cells"
    until(lambda: len(list(cells.glob("*.json"))) >= 2, first)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*.json")}
    assert len(before) < 6
    done = program(*words)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 6 cells are finished already" in done.stderr
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    local = program(*words, "--executor", "local", "--output", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    assert _numbers(tmp_path / "out") == _numbers(tmp_path / "local")


def _numbers(output):
    """The results, less what a record says of how it was made."""
    return {
        name: {k: v for k, v in found.items() if k != "settings"} if isinstance(found, dict) else found
        for name, found in results(output).items()
    }


@STOPS
def test_a_run_that_is_stopped_before_it_has_workers_says_so(saved_llama, tmp_path, number, status, word):
    """There Ray itself notices the signal, and makes another error of it."""
    words = _command(saved_llama, tmp_path, "--tasks", "smoke_questions", "--method", "dense", "--limit", "4")
    process = started(*words)
    until((tmp_path / "out" / "logs").exists, process)
    process.send_signal(number)
    assert process.wait() == status
    assert process.stderr.splitlines()[-1] == f"{word}; the same command resumes the run"


@STOPS
def test_a_stopped_run_keeps_what_is_answered_and_the_same_command_goes_on(saved_llama, tmp_path, number, status, word):
    sweep = ("--tasks", "smoke_summary", "--method", "dense", "--limit", "12", "--batch-size", "1")
    words = _command(saved_llama, tmp_path, *sweep)
    process = started(*words, session=True)
    until(lambda: _kept(tmp_path), process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all that the command has started
    else:
        process.send_signal(number)
    assert process.wait() == status
    assert process.stderr.splitlines()[-1] == f"{word}; the same command resumes the run"
    (log,) = (tmp_path / "out" / "logs").glob("worker-*.log")
    worker = int(log.read_text().split("process ")[1].split()[0])
    until(lambda: not Path(f"/proc/{worker}").exists(), timeout=20)  # no worker outlives the run
    done = program(*words)
    assert done.returncode == 0, done.stderr
    assert "smoke_summary-dense goes on after" in done.stderr
