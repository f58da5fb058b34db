"""What the driver of a sweep on Ray does beside its actors, without a cluster."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dart_eval.cluster import cluster
from dart_eval.sweep.config import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch

ray = pytest.importorskip("ray")


def _config(folder, tmp_path):
    sweep = {"tasks": "smoke_questions", "method": "dense,griffin", "limit": 2, "executor": "ray"}
    return config_from(None, {**sweep, "model": str(folder), "output": str(tmp_path / "out")})


class Here:
    """A pool of workers in this process, a new one for every task."""

    def __init__(self, make, size, options):
        self.make = make

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, tasks, handler):
        for task in tasks:
            worker, payload = self.make(), handler.begin(task)
            handler.on_done(task, worker.run(payload, lambda message, task=task: handler.on_message(task, message)))


def test_what_is_odd_about_a_checkpoint_is_said_once_whichever_worker_loaded_it(
    saved_llama, tmp_path, monkeypatch, own_signals
):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(cluster, "Pool", Here)
    odd = shutil.copytree(saved_llama, tmp_path / "odd")
    weights = load_file(odd / "model.safetensors")
    save_file({**weights, "model.extra.weight": torch.ones(2)}, odd / "model.safetensors", {"format": "pt"})
    view = Watch()
    result = cluster.run_all([_config(odd, tmp_path)], view)
    assert len(result.records) == len(view.done) == 2
    notes = [record.settings["notes"] for record in result.records]
    assert notes[0] == notes[1] != []
    assert view.notes == ["up to 2 workers on cpu, each with 1 CPU", *notes[0]]


def test_a_cluster_of_our_own_has_the_processors_that_we_may_use(saved_llama, tmp_path, monkeypatch):
    begun = []

    def init(**given):
        begun.append(given["num_cpus"])
        raise RuntimeError("not here")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for ours in (8, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, ours=ours: set(range(ours)), raising=False)
        with pytest.raises(UserError, match="no Ray cluster"):
            cluster.run_all([_config(saved_llama, tmp_path)], Watch())
    assert begun == [8, None]  # where all are ours Ray counts them: it knows of quotas, too
