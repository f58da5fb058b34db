"""Cells on a real Ray cluster of two workers: what the local executor writes, whatever happens on the way."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dart_eval.errors import UserError
from dart_eval.evaluation.part import Part
from dart_eval.executors import cluster, jobs, run_all
from dart_eval.plan import config_from
from tests.helpers.commands import run_local
from tests.helpers.models import save_tiny

ray = pytest.importorskip("ray")
PROGRAM = str(Path(sys.executable).with_name("dart-eval"))
SWEEP = {"tasks": "smoke", "method": "dense,griffin,dart", "sparsity": "0.5", "limit": 6, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": str(folder), "output": str(output), "executor": "ray", **changes})


def _files(output):
    """Records without what differs between two equal runs, and all other results as they are."""
    found = {}
    for kind in ("cells", "samples", "texts"):
        for path in sorted((output / kind).glob("*.json*")):
            if kind == "cells":
                data = json.loads(path.read_text())
                del data["measured"], data["digest"]
                found[path.name] = data
            else:
                found[path.name] = path.read_text()
    return found


class _Watch(jobs.Silent):
    def __init__(self):
        self.made, self.broken, self.notes, self.answered = [], [], [], 0

    def advanced(self, cell, requests):
        self.answered += requests

    def finished(self, cell, record):
        self.made.append(cell.name)

    def failed(self, cell, error, where):
        self.broken.append((cell.name, error, where))

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def here(folder, tmp_path_factory):
    """What the local executor writes, with as many threads as a Ray worker has."""
    output, threads = tmp_path_factory.mktemp("local") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_local(_config(folder, output, executor="local"), jobs.Silent())
    finally:
        torch.set_num_threads(threads)
    return _files(output)


def test_every_smoke_cell_is_the_local_executors(folder, tmp_path, here):
    view = _Watch()
    result = run_all([_config(folder, tmp_path / "out")], view)
    assert _files(tmp_path / "out") == here
    assert len(view.made) == len(set(view.made)) == len(result.records) > 10
    assert not result.failed and not list((tmp_path / "out" / "partial").glob("*"))
    assert view.notes == ["up to 2 workers on cpu, each with 1 CPU"]
    logs = [p.read_text() for p in sorted((tmp_path / "out" / "logs").glob("worker-*.log"))]
    assert len(logs) == 2 and all("runs on" in text and "begins" in text for text in logs)
    again = _Watch()
    assert len(run_all([_config(folder, tmp_path / "out")], again).records) == len(result.records)
    assert not again.made  # nothing is run twice, and no actor is asked for


def test_shards_and_a_killed_worker_change_nothing(folder, tmp_path, here):
    class Killing(_Watch):
        killed = None

        def advanced(self, cell, requests):
            super().advanced(cell, requests)
            if self.killed is None and self.answered > 20:
                text = (tmp_path / "out" / "logs" / "worker-1.log").read_text()
                self.killed = int(re.findall(r"process (\d+)", text)[0])
                os.kill(self.killed, signal.SIGKILL)

    view = Killing()
    result = run_all([_config(folder, tmp_path / "out", shards=4)], view)
    assert view.killed and sum("worker 1 was lost" in note for note in view.notes) == 1
    assert not result.failed
    assert _files(tmp_path / "out") == here
    text = "".join(p.read_text() for p in (tmp_path / "out" / "logs").glob("*.log"))
    assert "part 4 of 4 is done" in text and "the whole is done" in text
    assert (tmp_path / "out" / "logs" / "worker-3.log").exists()


class Poisoned(cluster.CellWorker):
    """Fails at the cells of one method."""

    def run(self, payload, tell):
        if "griffin" in self.name(payload):
            raise RuntimeError("planted")
        return super().run(payload, tell)

    def name(self, payload):
        found, _ = jobs.plan_all([payload.config], jobs.Silent(), False, "cpu", self.model)
        return found[payload.key].cell.name


def test_a_poisoned_cell_is_recorded_and_the_sweep_goes_on(folder, tmp_path, monkeypatch, here):
    monkeypatch.setattr(cluster, "CellWorker", Poisoned)
    view = _Watch()
    result = run_all([_config(folder, tmp_path / "out", tasks="smoke_questions")], view)
    assert sorted(view.made) == ["smoke_questions-dart-0.5", "smoke_questions-dense"]
    assert [c.name for c in result.failed] == ["smoke_questions-griffin-0.5"]
    ((name, error, where),) = view.broken
    assert (name, error) == ("smoke_questions-griffin-0.5", "RuntimeError: planted (tried 3 times)")
    assert 'raise RuntimeError("planted")' in where.read_text()
    monkeypatch.undo()
    assert not run_local(
        _config(folder, tmp_path / "out", tasks="smoke_questions", executor="local"), view
    ).failed  # the local executor goes on with the folder
    assert view.made[-1] == "smoke_questions-griffin-0.5" and len(view.made) == 3
    assert not where.exists()


class Hungry(Poisoned):
    """Dies at the cells of one method, until their batches are smaller."""

    def run(self, payload, tell):
        if "griffin" in self.name(payload) and not payload.shrink:
            os.kill(os.getpid(), signal.SIGKILL)
        return cluster.CellWorker.run(self, payload, tell)


def test_a_cell_that_kills_workers_is_tried_with_half_the_batch(folder, tmp_path, monkeypatch, here):
    monkeypatch.setattr(cluster, "CellWorker", Hungry)
    assert not run_all([_config(folder, tmp_path / "out", tasks="smoke_questions")], _Watch()).failed
    made = _files(tmp_path / "out")
    cells = {name: data for name, data in made.items() if name.endswith(".json")}
    assert len(cells) == 3
    for name, data in cells.items():
        halved = data["settings"].pop("halved", 0)
        assert halved == ("griffin" in name)
        assert data["inputs"] == here[name]["inputs"]
        for ours, theirs in zip(data["metrics"], here[name]["metrics"], strict=True):
            assert ours["value"] == pytest.approx(theirs["value"], abs=1e-4)


def test_a_killed_driver_loses_nothing(folder, tmp_path, here):
    """The first run is killed with all that belongs to it; the same command goes on."""
    command = [
        *(PROGRAM, "run", "--model", str(folder), "--output", str(tmp_path / "out"), "--executor", "ray"),
        *("--tasks", SWEEP["tasks"], "--method", SWEEP["method"], "--limit", "6", "--batch-size", "2"),
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while len(list((tmp_path / "out" / "cells").glob("*.json"))) < 2:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").glob("*.json")}
    assert len(before) < len(here)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of " in done.stdout
    assert _files(tmp_path / "out") == here
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_what_no_cluster_could_do_is_refused(folder, tmp_path):
    for changes, word in (
        ({"cpus_per_cell": 64}, "no node of the cluster has 64 CPUs and 0 GPUs"),
        ({"gpus_per_cell": 1}, "no node of the cluster has a GPU"),
        ({"device": "cuda"}, "no node of the cluster has a GPU"),
        ({"device_map": "auto"}, "--device-map auto needs workers with GPUs"),
        ({"tasks": "nonsense"}, "nonsense"),
    ):
        with pytest.raises(UserError, match=word):
            run_all([_config(folder, tmp_path / "out", **changes)], _Watch())
    assert not (tmp_path / "out").exists()
    for given in ({"cpus_per_cell": 0}, {"shards": 0}, {"gpus_per_cell": -1}, {"executor": "slurm"}):
        with pytest.raises(UserError):
            _config(folder, tmp_path / "out", **given)
    with pytest.raises(UserError, match="--shards is for Ray"):
        _config(folder, tmp_path / "out", executor="local", shards=2)


def test_tasks_that_set_a_time_out_get_none_in_an_actor():
    """In a thread Python would refuse it, and lm-eval's math tasks would take that for a wrong answer."""
    cluster._settle(None, "/no/such/folder")
    found = []
    thread = threading.Thread(
        target=lambda: found.extend([signal.signal(signal.SIGALRM, print), signal.alarm(1), signal.setitimer(0, 1)])
    )
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL, 0, (0.0, 0.0)]
    assert signal.getsignal(signal.SIGALRM) is not print
    time.sleep(1.1)  # no alarm comes


def test_an_actor_evaluates_cells_of_several_sweeps(folder, tmp_path):
    """Of the same task: what a run writes into lm-eval's task must not change the next sweep's keys."""
    configs = [_config(folder, tmp_path, tasks="smoke_questions", method=m, device="cpu") for m in ("dense", "griffin")]
    worker, told = cluster.CellWorker(configs[0], None, os.getcwd()), []
    # Nobody but the driver has to see the folder of results.
    (tmp_path / "file").touch()
    configs = [dataclasses.replace(c, output=str(tmp_path / "file")) for c in configs]
    for config in [*configs, configs[0]]:
        (key,) = jobs.plan_all([config], jobs.Silent(), False, "cpu")[0]
        payload = cluster._Payload(key, config, cluster.WHOLE, {}, 0, 5.0, 0)
        _, record = worker.run(payload, told.append)
        assert record.key == key and record.seconds > 5
        answers = {name: answer for message in told for name, answer in message[0].items()}
        told.clear()
        worker.run(cluster._Payload(key, config, cluster.WHOLE, answers, 0, 0.0, 0), told.append)
        assert not told  # all of it had been answered
    # Parts cover the cell, also where memory ran out in one of them.
    (key,) = jobs.plan_all([configs[1]], jobs.Silent(), False, "cpu")[0]
    for index, shrink in ((0, 1), (1, 0)):
        assert worker.run(cluster._Payload(key, configs[1], Part(index, 2), {}, 0, 0.0, shrink), told.append) == shrink
    answers = {name: answer for message in told for name, answer in message[0].items()}
    told.clear()
    worker.run(cluster._Payload(key, configs[1], cluster.WHOLE, answers, 0, 0.0, 0), told.append)
    assert not told
    with pytest.raises(UserError, match="would not evaluate the cell that the driver planned"):
        worker.run(cluster._Payload("other", configs[0], cluster.WHOLE, {}, 0, 0.0, 0), told.append)
