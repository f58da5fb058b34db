"""A sweep stopped anywhere goes on where it was: kill -9, signals, a second process, a full disk, damaged files."""

import dataclasses
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dart_eval.results.store import Journal
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import StoreError
from tests.helpers.commands import CONTEXT, STOPPING, Watch, command, program, results, run_local, start, started, until

SWEEP = {
    "method": "dense,dart:remask.window=3:remask.min_windows=1:remask.ring=5", "sparsity": "0.5", "limit": 6,
    "batch_size": 2, "tasks": "smoke_questions,smoke_summary", "gen_kwargs": "max_gen_toks=16",
}  # fmt: skip
KILLS = 4


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": folder, "output": str(output), **changes})


class _Teller(Watch):
    """Says through a pipe how it goes; one that holds stays in its first cell for good."""

    def __init__(self, pipe, holds):
        super().__init__()
        self.pipe, self.holds = pipe, holds

    def __call__(self, event):
        super().__call__(event)
        if event.kind == "planned":
            self.pipe.send(("planned", time.monotonic()))
        elif event.kind == "wait":
            self.pipe.send((event.text.split()[0], event.text))
        elif event.kind == "started":
            self.pipe.send(("started", event.cell.name))
            if self.holds:
                time.sleep(600)


def _child(folder, output, pipe, holds):
    view = _Teller(pipe, holds)
    run_local(_config(folder, output), view)
    pipe.send(("end", view.begun))


def _start(folder, output, holds=False):
    ours, theirs = CONTEXT.Pipe()
    process = start(_child, folder, output, theirs, holds)
    theirs.close()
    return process, ours


def _wait_for(pipe, word):
    while True:
        said, value = pipe.recv()
        if said == word:
            return value


@pytest.fixture(scope="module")
def undisturbed(saved_llama, tmp_path_factory):
    """The files of a run that nothing stopped, and how long its cells took."""
    output = tmp_path_factory.mktemp("whole") / "out"
    process, pipe = _start(saved_llama, output)
    began = _wait_for(pipe, "planned")
    _wait_for(pipe, "end")
    seconds = time.monotonic() - began
    process.join()
    return results(output), seconds


@pytest.mark.process
@pytest.mark.slow
def test_kill_9_at_random_moments(saved_llama, tmp_path, undisturbed):
    whole, seconds = undisturbed
    moments, kills, inside, sweeps = random.Random(0), 0, 0, 0

    def enough():  # some of them are to hit a cell in the middle, however fast it is
        return (kills >= KILLS and inside >= 2) or kills >= 10 * KILLS

    while not enough() or sweeps == 0:
        output = tmp_path / f"out-{sweeps}"
        while True:
            process, pipe = _start(saved_llama, output)
            _wait_for(pipe, "planned")
            longer = 1 + kills / KILLS  # a machine that has become slower since has reached no cell
            process.join(None if enough() else moments.uniform(0, longer * seconds / 6))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            inside += any(p.stat().st_size for p in (output / "partial").glob("*"))
        assert results(output) == whole
        assert not list((output / "partial").glob("*"))
        sweeps += 1
    assert inside >= 2


@pytest.mark.parametrize(("task", "limit"), [("smoke_questions", 6), ("smoke_summary", 4)])
def test_an_interrupted_cell_loses_only_the_batch_in_flight(saved_llama, tmp_path, monkeypatch, task, limit):
    stock, batches, stop_at = Journal.add, [], None

    def add(self, *batch):
        if self.path is None:
            return stock(self, *batch)  # of dense's states
        if len(batches) == stop_at:
            raise KeyboardInterrupt  # it has been answered, and is not kept
        batches.append(1)
        stock(self, *batch)

    monkeypatch.setattr(Journal, "add", add)
    whole = _config(saved_llama, tmp_path / "whole", tasks=task, method="dart", batch_size=1, limit=limit)
    run_local(whole, Watch())
    needed = len(batches)
    assert needed > 3
    batches, stop_at = [], 2
    config = dataclasses.replace(whole, output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run_local(config, Watch())
    batches, stop_at = [], None
    view = Watch()
    run_local(config, view)
    assert len(batches) == needed - 2
    assert f"{task}-dart-0.5 goes on after" in view.notes[0]
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


@pytest.mark.process
def test_two_processes_share_the_cells(saved_llama, tmp_path, undisturbed):
    pair = [_start(saved_llama, tmp_path / "out") for _ in range(2)]
    made = [_wait_for(pipe, "end") for _, pipe in pair]
    for process, _ in pair:
        process.join()
        assert process.exitcode == 0
    assert results(tmp_path / "out") == undisturbed[0]
    both = [*made[0], *made[1]]
    assert sorted(both) == sorted(set(both))  # no cell twice
    assert len(both) == 4


@pytest.mark.process
def test_a_process_takes_over_what_a_dead_one_had_claimed(saved_llama, tmp_path, undisturbed):
    first, pipe = _start(saved_llama, tmp_path / "out", holds=True)
    cell = _wait_for(pipe, "started")
    second, other = _start(saved_llama, tmp_path / "out")
    assert cell in _wait_for(other, "waiting")  # it has made all the others
    os.kill(first.pid, signal.SIGKILL)
    assert cell in _wait_for(other, "end")
    second.join()
    assert results(tmp_path / "out") == undisturbed[0]


@pytest.mark.parametrize("kind", ["cells", "samples", "texts"])
def test_damaged_files_are_set_aside_named_and_redone(saved_llama, tmp_path, kind):
    config = _config(saved_llama, tmp_path / "out", tasks="smoke_questions")
    run_local(config, Watch())
    whole = results(tmp_path / "out")
    # Texts are those of both cells: the first that is run again makes them whole for the other.
    method = "dense" if kind == "texts" else "dart-0.5"
    damaged = next((tmp_path / "out" / kind).glob("smoke_questions-" + ("*" if kind == "texts" else "dart*")))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    view = Watch()
    run_local(config, view)
    assert view.begun == [f"smoke_questions-{method}"]
    assert any(f"{method} was damaged: set aside as" in note for note in view.notes)
    assert {n: d for n, d in results(tmp_path / "out").items() if "damaged" not in n} == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.process
@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing_finished(saved_llama, small_disk, undisturbed):
    ballast = small_disk / "ballast"
    output = small_disk / "out"
    stopped = 0
    for free in (4, 12, 24, 40, 60, 300):  # kB, more at each try
        ballast.write_bytes(b"")
        room = os.statvfs(small_disk)
        ballast.write_bytes(b"x" * max(0, room.f_bavail * room.f_bsize - free * 1024))
        if free == 300:
            ballast.unlink()
        before = {p: p.read_bytes() for p in (output / "cells").glob("*.json")}
        try:
            run_local(_config(saved_llama, output), Watch())
        except StoreError as error:
            stopped += "No space left" in str(error)
        assert all(p.read_bytes() == data for p, data in before.items())
    assert stopped >= 3
    assert results(output) == undisturbed[0]


def _command(folder, tmp_path):
    """A run of many small batches."""
    return [
        *("run", "--model", folder, "--output", str(tmp_path / "out")),
        *("--tasks", "smoke_summary", "--method", "dense", "--limit", "12", "--batch-size", "1"),
        *("--gen-kwargs", "max_gen_toks=16"),
    ]


def _until_batches_are_kept(process, tmp_path, count=1):
    until(lambda: sum(p.read_bytes().count(b"\n") for p in (tmp_path / "out").glob("partial/*")) >= count, process)


def _goes_on(folder, tmp_path):
    done = program(*_command(folder, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "smoke_summary-dense goes on after" in done.stderr


@pytest.mark.process
@pytest.mark.slow
def test_the_installed_program_ends_by_ctrl_c_in_one_line_and_the_same_command_goes_on(saved_llama, tmp_path):
    """Started anew, as a shell does it."""
    words = [Path(sys.executable).with_name("dart-eval"), *_command(saved_llama, tmp_path)]
    # A shell starts its background jobs with SIGINT ignored, and a child inherits that: not here.
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    _until_batches_are_kept(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors.splitlines()[-1].split(";")[0]) == (130, "interrupted")
    _goes_on(saved_llama, tmp_path)


@pytest.mark.process
def test_under_nohup_only_a_terminated_run_ends_says_so_in_one_line_and_the_same_command_goes_on(saved_llama, tmp_path):
    process = started(*_command(saved_llama, tmp_path), ignored=[signal.SIGHUP])
    _until_batches_are_kept(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    _until_batches_are_kept(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    assert (process.wait(), process.stderr.splitlines()[-1].split(";")[0]) == (143, "terminated")
    _goes_on(saved_llama, tmp_path)


def test_a_stopped_run_under_force_does_not_promise_to_go_on(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.cluster.run.run_all", lambda *_: signal.raise_signal(signal.SIGTERM))
    asked = "run", "--model", saved_llama, "--tasks", "smoke_questions", "--output", tmp_path / "out"
    for more, promised in (["--force"], False), ([], True):
        done = command(*asked, *more)
        assert (done.code, "resumes" in done.err.splitlines()[-1]) == (143, promised)


@pytest.mark.process
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_while_python_ends_is_quiet(tmp_path, number):
    """The work is done, and libraries tidy up: torch's callbacks are among those that are interrupted then."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import atexit, time\nfrom dart_eval import cli\n"
        "atexit.register(lambda: (print('ends', flush=True), time.sleep(60)))\ncli.main()\n"
    )
    process = started("--version", script=script)
    until(lambda: "ends" in process.stdout, process)
    process.send_signal(number)
    assert (process.wait(30), process.stderr) == (-number, "")  # a shell shows the same status


@pytest.mark.process
def test_a_terminal_that_is_closed_ends_the_run_and_the_same_command_goes_on(saved_llama, tmp_path):
    ours, theirs = pty.openpty()
    process = started(*_command(saved_llama, tmp_path), stdin=theirs, stdout=theirs, stderr=theirs, session=True)
    os.close(theirs)
    _until_batches_are_kept(process, tmp_path)
    os.close(ours)
    assert process.wait(60) == 129
    _goes_on(saved_llama, tmp_path)


def test_a_folder_that_is_deleted_inside_a_cell_holds_that_cell_in_the_end(saved_llama, tmp_path, monkeypatch):
    stock, deleted = Journal.add, []

    def add(self, *answers):
        if not deleted:
            deleted.append(shutil.rmtree(tmp_path / "out"))
        return stock(self, *answers)

    monkeypatch.setattr(Journal, "add", add)
    result = run_local(_config(saved_llama, tmp_path / "out", tasks="smoke_questions"), Watch())
    assert deleted and not result.failed and len(list((tmp_path / "out" / "cells").iterdir())) == 2


@pytest.mark.slow
def test_rows_are_as_far_from_dense_whoever_kept_its_states(saved_llama, tmp_path):
    """Dense, first or last; a row before it; nobody, as their file is damaged; on rounded weights too."""
    given = {"model": saved_llama, "tasks": "smoke_questions,smoke_drift", "sparsity": "0.6", "limit": 4}
    both = {**given, "method": "dense,griffin", "ffn_bits": "16,4"}

    def ran(place, *methods, **more):
        for method in methods:
            run_local(config_from(None, {**both, "method": method, "output": str(tmp_path / place), **more}), Watch())
        return results(tmp_path / place)

    whole = ran("a", "dense,griffin")
    assert len(whole) == 2 * (4 + 4 + 1) and len([*(tmp_path / "a" / "states").iterdir()]) == 2
    kls = {name: cell["metrics"] for name, cell in whole.items() if name.endswith(".json")}
    with_kl = {name.partition("-")[2][:12] for name, of in kls.items() if any(m["metric"] == "kl" for m in of)}
    assert with_kl == {name.partition("-")[2][:12] for name in kls if "dense-" not in name or "4bit" in name}
    assert ran("b", "griffin", "dense") == whole
    for file in (tmp_path / "b" / "states").iterdir():
        file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    assert ran("b", "griffin,dense", force=True) == whole


@pytest.mark.slow
def test_a_task_whose_states_have_no_room_has_no_distance_and_says_so(saved_llama, tmp_path):
    given = {"model": saved_llama, "tasks": "smoke_drift", "limit": 2, "kl_room": 1e-6, "output": str(tmp_path)}
    for methods in ("griffin", "dense,wanda-sp"):  # before dense, and after
        told = Watch()
        for record in run_local(config_from(None, {**given, "method": methods}), told).records:
            assert not any("kl" in m.metric for m in record.metrics)
            assert (record.settings.get("kl") is False) == (record.inputs["method"] != "dense")
        assert told.notes == ["no KL on smoke_drift: dense's states take more than 1e-06 GB (--kl-room)"]
