"""Cells on a real Ray cluster of two processors: what a run in one process writes, whatever happens on the way."""

import os

import pytest
import torch

from dart_eval.cluster import run as cluster
from dart_eval.cluster.run import run_all
from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.executors.test_workers import broken_task
from tests.helpers.commands import Watch, program, results, run_local
from tests.helpers.nursery import LOCAL

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEEP = {
    "tasks": "smoke_questions,smoke_stories,smoke_summary", "method": "dense,dart", "sparsity": "0.5", "limit": 3,
    "batch_size": 2, "gen_kwargs": "max_gen_toks=16",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_processors(quick_workers):
    ray.init(num_cpus=2, **LOCAL)
    yield
    ray.shutdown()


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": folder, "output": str(output), "ray": "auto", **changes})


def test_cells_of_every_kind_are_those_of_one_process_and_the_driver_alone_writes(saved_llama, tmp_path, monkeypatch):
    threads, saved, save = torch.get_num_threads(), [], Store.save
    torch.set_num_threads(1)  # as on Ray
    try:
        run_local(_config(saved_llama, tmp_path / "local", ray=None), Watch())
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(Store, "save", lambda *args: saved.append(os.getpid()) or save(*args))
    view = Watch()
    result = run_all([_config(saved_llama, tmp_path / "out")], view)
    assert results(tmp_path / "out") == results(tmp_path / "local")
    assert len(view.done) == len(set(view.done)) == len(result.records) == len(saved) == 6
    assert not result.failed and not list((tmp_path / "out" / "partial").glob("*"))
    again = Watch()
    assert len(run_all([_config(saved_llama, tmp_path / "out")], again).records) == len(result.records)
    assert not again.done  # nothing is run twice


def _poisoned(saved_llama, tmp_path, what):
    settings = broken_task(tmp_path / "tasks", "poison", what)
    asked = {"tasks": "poison,smoke_questions", "method": "dense", "limit": 2, "batch_size": 1, **settings}
    return _config(saved_llama, tmp_path / "out", **asked)


@pytest.mark.parametrize("always", [False, True])
def test_a_cell_whose_process_is_killed_is_tried_again_and_at_last_fails_alone(
    saved_llama, tmp_path, monkeypatch, always
):
    monkeypatch.setattr(cluster, "TRIES", 1)
    mark, view = tmp_path / "killed", Watch()
    spared = "False" if always else f"os.path.exists({str(mark)!r})"
    kill = f"{spared} or (open({str(mark)!r}, 'w').close(), os.kill(os.getpid(), 9))"
    result = run_all([_poisoned(saved_llama, tmp_path, kill)], view)
    assert mark.exists() and [c.name for c in result.failed] == ["poison-dense"] * always
    assert sorted(view.done) == ["poison-dense"] * (not always) + ["smoke_questions-dense"]
    if always:
        ((_, problem, where),) = view.broken
        assert "WorkerCrashedError" in problem and where.is_file()


def test_a_failing_cell_keeps_its_answers_and_another_run_goes_on_with_them(saved_llama, tmp_path):
    cure, view = tmp_path / "cure", Watch()
    config = _poisoned(saved_llama, tmp_path, f"1 / os.path.exists({str(cure)!r})")
    result = run_all([config], view)
    assert ([c.name for c in result.failed], view.done) == (["poison-dense"], ["smoke_questions-dense"])
    ((_, problem, where),) = view.broken
    assert problem == "ZeroDivisionError: division by zero" and "Traceback" in where.read_text()
    cure.touch()
    again = Watch()
    run_all([config], again)
    assert again.done == ["poison-dense"] and not where.exists()
    assert again.notes == ["poison-dense goes on after 1 answers of an earlier run"]  # its prompts are equal


@pytest.mark.parametrize(("changes", "word"), [
    ({"gpus_per_cell": 1}, "1 GPUs"), ({"device": "cuda"}, "1 GPUs"), ({"tasks": "nonsense"}, "nonsense"),
    ({"ray": None, "gpus_per_cell": 2}, "--ray"), ({"device": "cpu", "gpus_per_cell": 2}, "--device cpu"),
    ({"gpus_per_cell": 0}, "gpus_per_cell"), ({"device": "cuda:1"}, "cuda:1"), ({"workers": 2}, "--workers"),
])  # fmt: skip
def test_what_no_cluster_could_do_is_refused(saved_llama, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        run_all([_config(saved_llama, tmp_path / "out", **changes)], Watch())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("asked", "expected"), [
    ({}, (1, "cuda", None)), ({"gpus_per_cell": 2}, (2, "cuda", "auto")), ({"device": "cpu"}, (0, "cpu", None)),
])  # fmt: skip
def test_a_cell_takes_the_gpus_that_there_are(saved_llama, tmp_path, monkeypatch, asked, expected):
    """On a node with four of them, as far as Ray is told."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 4.0}}])
    placed = []

    def remote(**resources):
        def remote(config, key, journal, common, folder):
            placed.append((resources["num_gpus"], common.device, common.device_map))
            raise UserError("it is known")

        return lambda _: type("Remote", (), {"remote": staticmethod(remote)})

    monkeypatch.setattr(ray, "remote", remote)
    with pytest.raises(UserError, match="it is known"):
        cluster.run_all([_config(saved_llama, tmp_path / "out", tasks="smoke_questions", **asked)], Watch())
    assert placed == [expected]


@pytest.mark.process
def test_a_running_cluster_is_used_and_left_running(saved_llama, tmp_path):
    address = ray.get_runtime_context().gcs_address
    words = "run", "--model", saved_llama, "--tasks", "smoke_questions", "--method", "griffin", "--limit", "2", "--ray"
    done = program(*words, address, "--output", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count("done smoke_questions") == 1, done.stderr
    assert any(node["Alive"] for node in ray.nodes())
    lost = program(*words, "127.0.0.1:1", "--output", tmp_path / "o")
    assert lost.returncode == 2 and "127.0.0.1:1" in lost.stderr and not (tmp_path / "o").exists()
