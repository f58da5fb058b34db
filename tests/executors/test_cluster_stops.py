"""`dart-eval run --ray` killed or stopped: finished cells are kept, and the same command goes on."""

import os
import signal

import psutil
import pytest

from dart_eval.sweep.options import config_from
from tests.helpers.commands import Watch, run_local, started, until

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("quick_workers")]
SWEEP = {
    "tasks": "smoke_questions,smoke_stories", "method": "dense,griffin", "sparsity": "0.5", "limit": "6",
    "batch_size": "1",
}  # fmt: skip


def begun(model, output):
    words = [word for name, value in SWEEP.items() for word in (f"--{name}", value)]
    return started("run", "--model", model, "--output", output, "--ray", "local", *words, session=True)


# Those that Ray has its own ways with; the end of a terminal: test_resume.py.
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_keeps_what_is_finished_and_another_goes_on(saved_llama, tmp_path, number, status):
    process, cells = begun(saved_llama, tmp_path / "out"), tmp_path / "out" / "cells"
    until(lambda: list(cells.glob("*.json")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all that the command has started
        assert process.wait() == status and process.stderr.splitlines()[-1].startswith("interrupted")
        assert workers and not psutil.wait_procs(workers, timeout=20)[1]  # none outlives the run
    else:
        process.kill()
        assert process.wait() == status
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*.json")}
    assert 0 < len(before) < 4
    view = Watch()
    done = run_local(config_from(None, {**SWEEP, "model": saved_llama, "output": str(tmp_path / "out")}), view)
    assert len(done.records) == 4 and len(view.done) == 4 - len(before)
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())


def test_a_run_that_is_stopped_before_its_first_cell_says_so(saved_llama, tmp_path):
    """There Ray itself notices the signal, and makes another error of it."""
    process = begun(saved_llama, tmp_path / "out")
    until((tmp_path / "out" / ".locks").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and process.stderr.splitlines()[-1].startswith("terminated")
