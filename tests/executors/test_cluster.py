"""Cells on a real Ray cluster of two workers: what the local executor writes, whatever happens on the way."""

import os
import re
import signal

import pytest
import torch

from dart_eval.cluster import cluster
from dart_eval.cluster.run import run_all
from dart_eval.sweep import jobs
from dart_eval.sweep.config import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, results, run_local
from tests.helpers.nursery import LOCAL

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEEP = {
    "tasks": "smoke", "method": "dense,griffin,dart", "sparsity": "0.5", "limit": 6, "batch_size": 2,
    "gen_kwargs": "max_gen_toks=16",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_workers(quick_workers):
    ray.init(num_cpus=2, **LOCAL)
    yield
    ray.shutdown()


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": folder, "output": str(output), "executor": "ray", **changes})


@pytest.fixture(scope="module")
def here(saved_llama, tmp_path_factory):
    """What the local executor writes, with as many threads as a Ray worker has."""
    output, threads = tmp_path_factory.mktemp("local") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_local(_config(saved_llama, output, executor="local"), jobs.Silent())
    finally:
        torch.set_num_threads(threads)
    return results(output)


def test_every_smoke_cell_is_the_local_executors(saved_llama, tmp_path, here):
    view = Watch()
    result = run_all([_config(saved_llama, tmp_path / "out")], view)
    assert results(tmp_path / "out") == here
    assert len(view.done) == len(set(view.done)) == len(result.records) > 10
    assert not result.failed and not list((tmp_path / "out" / "partial").glob("*"))
    assert view.notes == ["up to 2 workers on cpu, each with 1 CPU"]
    logs = [p.read_text() for p in sorted((tmp_path / "out" / "logs").glob("worker-*.log"))]
    assert len(logs) == 2 and all("runs on" in text and "begins" in text for text in logs)
    again = Watch()
    assert len(run_all([_config(saved_llama, tmp_path / "out")], again).records) == len(result.records)
    assert not again.done  # nothing is run twice, and no actor is asked for


def test_shards_and_a_killed_worker_change_nothing(saved_llama, tmp_path, here):
    class Killing(Watch):
        killed = None

        def advanced(self, cell, requests, fresh=True):
            super().advanced(cell, requests)
            if self.killed is None and self.answered > 20:
                text = (tmp_path / "out" / "logs" / "worker-1.log").read_text()
                self.killed = int(re.findall(r"process (\d+)", text)[0])
                os.kill(self.killed, signal.SIGKILL)

    view = Killing()
    result = run_all([_config(saved_llama, tmp_path / "out", shards=4)], view)
    assert view.killed and sum("worker 1 was lost" in note for note in view.notes) == 1
    assert not result.failed
    assert results(tmp_path / "out") == here
    text = "".join(p.read_text() for p in (tmp_path / "out" / "logs").glob("*.log"))
    assert "shard 4 of 4 is done" in text and "the whole is done" in text
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


def test_a_poisoned_cell_is_recorded_and_the_sweep_goes_on(saved_llama, tmp_path, monkeypatch, here):
    monkeypatch.setattr(cluster, "CellWorker", Poisoned)
    view = Watch()
    result = run_all([_config(saved_llama, tmp_path / "out", tasks="smoke_questions")], view)
    assert sorted(view.done) == ["smoke_questions-dart-0.5", "smoke_questions-dense"]
    assert [c.name for c in result.failed] == ["smoke_questions-griffin-0.5"]
    ((name, error, where),) = view.broken
    assert (name, error) == ("smoke_questions-griffin-0.5", "RuntimeError: planted (tried 3 times)")
    assert 'raise RuntimeError("planted")' in where.read_text()
    monkeypatch.undo()
    config = _config(saved_llama, tmp_path / "out", tasks="smoke_questions", executor="local")
    assert not run_local(config, view).failed  # the local executor goes on with the folder
    assert view.done[-1] == "smoke_questions-griffin-0.5" and len(view.done) == 3
    assert not where.exists()


class Hungry(Poisoned):
    """Dies at the cells of one method, until their batches are smaller."""

    def run(self, payload, tell):
        if "griffin" in self.name(payload) and not payload.shrink:
            os.kill(os.getpid(), signal.SIGKILL)
        return cluster.CellWorker.run(self, payload, tell)


def test_a_cell_that_kills_workers_is_tried_with_half_the_batch(saved_llama, tmp_path, monkeypatch, here):
    monkeypatch.setattr(cluster, "CellWorker", Hungry)
    assert not run_all([_config(saved_llama, tmp_path / "out", tasks="smoke_questions")], Watch()).failed
    made = results(tmp_path / "out")
    cells = {name: data for name, data in made.items() if name.endswith(".json")}
    assert len(cells) == 3
    for name, data in cells.items():
        halved = data["settings"].pop("halved", 0)
        assert halved == ("griffin" in name)
        assert data["inputs"] == here[name]["inputs"]
        for ours, theirs in zip(data["metrics"], here[name]["metrics"], strict=True):
            assert ours["value"] == pytest.approx(theirs["value"], abs=1e-4)


def test_what_no_cluster_could_do_is_refused(saved_llama, tmp_path, indexed):
    for changes, word in (
        ({"cpus_per_cell": 64}, "no node of the cluster has 64 CPUs and 0 GPUs"),
        ({"gpus_per_cell": 1}, "no node of the cluster has a GPU"),
        ({"device": "cuda"}, "no node of the cluster has a GPU"),
        ({"device_map": "auto"}, "--device-map auto needs workers with GPUs"),
        ({"tasks": "nonsense"}, "nonsense"),
    ):
        with pytest.raises(UserError, match=word):
            run_all([_config(saved_llama, tmp_path / "out", **changes)], Watch())
    assert not (tmp_path / "out").exists()
    for given in ({"cpus_per_cell": 0}, {"shards": 0}, {"gpus_per_cell": -1}, {"executor": "slurm"}):
        with pytest.raises(UserError):
            _config(saved_llama, tmp_path / "out", **given)
    with pytest.raises(UserError, match="--shards needs --executor ray"):
        _config(saved_llama, tmp_path / "out", executor="local", shards=2)
