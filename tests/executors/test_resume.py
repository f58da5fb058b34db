"""A sweep stopped anywhere goes on where it was: kill -9, signals, a second process, a full disk, damaged files."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from dart_eval.errors import StoreError
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.scoring import Scorer
from dart_eval.executors import jobs
from dart_eval.plan import config_from
from tests.helpers.commands import STOPS, run_local
from tests.helpers.models import save_tiny

SWEEP = {
    "method": "dense,dart:window=3:min_windows=1:ring=5", "sparsity": "0.5", "limit": 6, "batch_size": 2,
    "tasks": "smoke_questions,smoke_summary",
}  # fmt: skip
KILLS = 20

# Children start from a server that has imported everything once; a plain fork would copy this process's threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dart_eval.executors.local", "lm_eval", "transformers", "tests.executors.test_resume"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": folder, "output": str(output), **changes})


class _Watch(jobs.Silent):
    """Records what the executor reports, and says when cells begin and end."""

    def __init__(self, pipe=None):
        self.pipe, self.made, self.notes = pipe, [], []

    def _say(self, word):
        if self.pipe is not None:
            self.pipe.send((word, time.monotonic()))

    def planned(self, cells, finished):
        self._say("planned")

    def started(self, cell, requests):
        self.made.append(cell.name)
        self._say("started")

    def finished(self, cell, record):
        self._say("finished")

    def note(self, text):
        self.notes.append(text)


def _child(folder, output, pipe, changes):
    view = _Watch(pipe)
    run_local(_config(folder, output, **changes), view)
    pipe.send(("end", view.made))


def _start(folder, output, **changes):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_child, args=(folder, output, theirs, changes))
    process.start()
    theirs.close()
    return process, ours


def _wait_for(pipe, word):
    while True:
        said, value = pipe.recv()
        if said == word:
            return value


def _files(output):
    """Every file of finished cells, as bytes; of records what two equal runs share."""
    found = {}
    for path in sorted(p for kind in ("cells", "samples", "texts") for p in (Path(output) / kind).iterdir()):
        data = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(data)
            del record["measured"], record["digest"]
            data = json.dumps(record, sort_keys=True)
        found[path.name] = data
    return found


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The files of a run that nothing stopped, and how long its cells took."""
    output = tmp_path_factory.mktemp("whole") / "out"
    process, pipe = _start(folder, output)
    began = _wait_for(pipe, "planned")
    _wait_for(pipe, "end")
    seconds = time.monotonic() - began
    process.join()
    return _files(output), seconds


def test_kill_9_at_random_moments(folder, tmp_path, undisturbed):
    whole, seconds = undisturbed
    moments, kills, inside, sweeps = random.Random(0), 0, 0, 0
    while kills < KILLS or sweeps == 0:
        output = tmp_path / f"out-{sweeps}"
        while True:
            process, pipe = _start(folder, output)
            _wait_for(pipe, "planned")
            process.join(moments.uniform(0, seconds / 6) if kills < KILLS else None)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            inside += any(p.stat().st_size for p in (output / "partial").glob("*"))
        assert _files(output) == whole
        assert not list((output / "partial").glob("*"))
        sweeps += 1
    assert inside >= 2  # some of them hit a cell in the middle, however fast it is


@pytest.mark.parametrize("task", ["smoke_questions", "smoke_summary"])
def test_an_interrupted_cell_loses_only_the_batch_in_flight(folder, tmp_path, monkeypatch, task):
    target = (Scorer, "_run") if task == "smoke_questions" else (PrunedLM, "_model_generate")
    stock = getattr(*target)
    batches, stop_at = [], None

    def counted(self, *args, **kwargs):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(*target, counted)
    whole = _config(folder, tmp_path / "whole", tasks=task, method="dart", batch_size=1)
    run_local(whole, _Watch())
    needed = len(batches)
    assert needed > 3
    batches, stop_at = [], 2
    config = dataclasses.replace(whole, output=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run_local(config, _Watch())
    batches, stop_at = [], None
    view = _Watch()
    run_local(config, view)
    assert len(batches) == needed - 2
    assert f"{task}-dart-0.5 goes on after" in view.notes[0]
    assert _files(tmp_path / "stopped") == _files(tmp_path / "whole")


def test_two_processes_share_the_cells(folder, tmp_path, undisturbed):
    pair = [_start(folder, tmp_path / "out") for _ in range(2)]
    made = [_wait_for(pipe, "end") for _, pipe in pair]
    for process, _ in pair:
        process.join()
        assert process.exitcode == 0
    assert _files(tmp_path / "out") == undisturbed[0]
    both = [*made[0], *made[1]]
    assert sorted(both) == sorted(set(both))  # no cell twice
    assert len(both) == 4


def test_a_process_takes_over_what_a_dead_one_had_claimed(folder, tmp_path, undisturbed):
    first, pipe = _start(folder, tmp_path / "out")
    _wait_for(pipe, "started")
    second, other = _start(folder, tmp_path / "out")
    _wait_for(other, "started")
    os.kill(first.pid, signal.SIGKILL)
    _wait_for(other, "end")
    second.join()
    assert _files(tmp_path / "out") == undisturbed[0]


@pytest.mark.parametrize("kind", ["cells", "samples", "texts"])
def test_damaged_files_are_set_aside_named_and_redone(folder, tmp_path, undisturbed, kind):
    config = _config(folder, tmp_path / "out", tasks="smoke_questions")
    run_local(config, _Watch())
    whole = _files(tmp_path / "out")
    # Texts are those of both cells: the first that is run again makes them whole for the other.
    method = "dense" if kind == "texts" else "dart-0.5"
    damaged = next((tmp_path / "out" / kind).glob("smoke_questions-" + ("*" if kind == "texts" else "dart*")))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    view = _Watch()
    run_local(config, view)
    assert view.made == [f"smoke_questions-{method}"]
    assert any(f"{damaged.name}.damaged-1" in note for note in view.notes)
    assert {n: d for n, d in _files(tmp_path / "out").items() if "damaged" not in n} == whole


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


def test_a_full_disk_stops_the_run_and_loses_nothing_finished(folder, small_disk, undisturbed):
    ballast = small_disk / "ballast"
    output = small_disk / "out"
    stopped = 0
    for free in (4, 12, 24, 40, 60, 300):  # kB, more at each try
        room = os.statvfs(small_disk)
        ballast.write_bytes(b"")
        room = os.statvfs(small_disk)
        ballast.write_bytes(b"x" * max(0, room.f_bavail * room.f_bsize - free * 1024))
        if free == 300:
            ballast.unlink()
        before = {p: p.read_bytes() for p in (output / "cells").glob("*.json")}
        try:
            run_local(_config(folder, output), _Watch())
        except StoreError as error:
            stopped += "No space left" in str(error)
        assert all(p.read_bytes() == data for p, data in before.items())
    assert stopped >= 3
    assert _files(output) == undisturbed[0]


def _command(folder, tmp_path):
    """A run of many small batches."""
    program = str(Path(sys.executable).with_name("dart-eval"))
    return [
        *(program, "run", "--model", folder, "--output", str(tmp_path / "out")),
        *("--tasks", "smoke_summary", "--method", "dense", "--limit", "30", "--batch-size", "1"),
    ]


@STOPS
def test_a_signal_is_said_in_one_line_and_the_same_command_goes_on(folder, tmp_path, number, status, word):
    command = _command(folder, tmp_path)
    # A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP, and a child inherits that: not here.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    _until_a_batch_is_kept(process, tmp_path / "out")
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors.strip()) == (status, f"{word}; the same command goes on from here")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "smoke_summary-dense goes on after" in done.stdout
    assert not done.stderr


def _until_a_batch_is_kept(process, output):
    while not any(p.stat().st_size for p in (output / "partial").glob("*")):
        assert process.poll() is None
        time.sleep(0.01)


def test_a_terminal_that_is_closed_ends_the_run_and_the_same_command_goes_on(folder, tmp_path):
    ours, theirs = pty.openpty()

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        _command(folder, tmp_path), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    _until_a_batch_is_kept(process, tmp_path / "out")
    os.close(ours)
    assert process.wait(60) == 129
    done = subprocess.run(_command(folder, tmp_path), capture_output=True, text=True, check=True)
    assert "smoke_summary-dense goes on after" in done.stdout


def test_nohup_goes_on_when_the_terminal_is_gone(folder, tmp_path):
    process = subprocess.Popen(
        _command(folder, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    _until_a_batch_is_kept(process, tmp_path / "out")
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
