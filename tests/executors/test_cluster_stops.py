"""`dart-eval run --ray` killed or stopped: finished cells are kept, and the same command goes on."""

import os
import signal

import psutil
import pytest

from tests.helpers.commands import program, started, until

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("quick_workers")]


# Those that Ray has its own ways with; the end of a terminal: test_resume.py.
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGKILL, -9, "")],
)
def test_a_stopped_run_keeps_what_is_finished_and_the_same_command_goes_on(saved_llama, tmp_path, number, status, word):
    sweep = ("--tasks", "smoke_questions,smoke_stories", "--method", "dense,griffin,dart", "--limit", "12")
    words = ("run", "--model", saved_llama, "--output", tmp_path / "out", "--ray", "local", *sweep, "--batch-size", "1")
    process, cells = started(*words, session=True), tmp_path / "out" / "cells"
    until(lambda: len(list(cells.glob("*.json"))) >= 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all that the command has started
    else:
        process.send_signal(number)
    assert process.wait() == status
    assert not word or process.stderr.splitlines()[-1] == f"{word}; the same command resumes the run"
    if number != signal.SIGKILL:
        assert workers and not psutil.wait_procs(workers, timeout=20)[1]  # none outlives the run
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*.json")}
    assert len(before) < 6
    done = program(*words)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 6 cells are finished already" in done.stderr
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())


def test_a_run_that_is_stopped_before_its_first_cell_says_so(saved_llama, tmp_path):
    """There Ray itself notices the signal, and makes another error of it."""
    words = (
        "run",
        "--model",
        saved_llama,
        "--output",
        tmp_path / "out",
        "--ray",
        "local",
        "--tasks",
        "smoke_questions",
    )
    process = started(*words)
    until((tmp_path / "out" / ".locks").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert process.stderr.splitlines()[-1] == "terminated; the same command resumes the run"


def test_no_cluster_at_that_address(saved_llama, tmp_path):
    done = program(
        "run", "--model", saved_llama, "--output", tmp_path / "o", "--tasks", "smoke", "--ray", "127.0.0.1:1"
    )
    assert done.returncode == 2 and "no Ray cluster at 127.0.0.1:1" in done.stderr
    assert not (tmp_path / "o").exists()
