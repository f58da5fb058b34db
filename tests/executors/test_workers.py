"""`--workers N`: processes on one machine share the cells of a run, whatever becomes of them."""

import contextlib
import subprocess
from types import SimpleNamespace

import pytest

from dart_eval.cluster.run import run_all
from dart_eval.sweep import run, workers
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Forked, Watch, results, run_local
from tests.helpers.tasks import write_task

pytestmark = pytest.mark.usefixtures("forked")
SWEEP = {"method": "dense,griffin,dart", "sparsity": "0.5", "limit": 6, "batch_size": 2, "tasks": "smoke_questions"}
CODE = """
import os
def judge(doc, results):
    {what}
    return {{"acc": 1.0}}
"""


@pytest.fixture
def forked(request, monkeypatch):
    """Workers are looked at often, and begin at once, but for one test, whose worker is started as a user's are."""
    monkeypatch.setattr(workers, "POLL", 0.02)
    if "as_a_users" not in request.node.name:
        monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE))


def config(model, output, **changes):
    return config_from(None, {**SWEEP, "model": model, "output": str(output), **changes})


def broken_task(folder, name, what):
    """A task whose answers cannot be judged."""
    more = f"process_results: !function {name}.judge\nmetric_list: [{{metric: acc}}]"
    write_task(folder, {"q": "one"}, {"q": "two"}, name=name, more=more)
    (folder / f"{name}.py").write_text(CODE.format(what=what))
    return {"include_path": str(folder), "confirm_run_unsafe_code": True}


@pytest.fixture(scope="module")
def alone(saved_llama, tmp_path_factory):
    """The files of a run in one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    run_local(config(saved_llama, output), Watch())
    return results(output)


@pytest.mark.process
def test_a_worker_that_is_started_as_a_users_makes_the_files_of_one_process(saved_llama, tmp_path, alone):
    view = Watch()
    workers.run_all([config(saved_llama, tmp_path / "out", workers=1, method="dart")], view)
    made = results(tmp_path / "out")
    assert made.items() <= alone.items() and len(made) == 3 and not view.begun


@pytest.mark.process
def test_two_workers_make_each_cell_once_and_anew_once_under_force(saved_llama, tmp_path, alone):
    for force, done in ((False, 3), (False, 0), (True, 3)):
        view = Watch()
        found = run_all([config(saved_llama, tmp_path / "out", workers=2, force=force)], view)
        assert len(view.done) == len(set(view.done)) == done
        assert [r.inputs["method"] for r in found.records] == ["dense", "griffin", "dart"]  # in the plan's order
        assert results(tmp_path / "out") == alone


@pytest.mark.process
def test_a_cell_that_kills_its_process_fails_in_this_run_alone(saved_llama, tmp_path):
    """A worker takes the place of one that died; the same command tries the cell again."""
    cure = tmp_path / "cure"
    settings = broken_task(tmp_path / "tasks", "poison", f"os.path.exists({str(cure)!r}) or os.kill(os.getpid(), 9)")
    broken_task(tmp_path / "tasks", "faulty", f"1 / os.path.exists({str(cure)!r})")
    tasks = "poison,faulty,smoke_questions"
    asked = config(saved_llama, tmp_path / "out", workers=1, tasks=tasks, method="dense", **settings)
    view = Watch()
    found = workers.run_all([asked], view)
    assert {cell.task for cell in found.failed} == {"poison", "faulty"}
    problems = sorted((problem, where.read_text()) for _, problem, where in view.broken)
    assert problems[0][0] == "ZeroDivisionError: division by zero" and "Traceback" in problems[0][1]
    assert problems[1][0] == problems[1][1] == "the process at work on it was killed"
    assert any("worker 1 died (signal 9)" in note for note in view.notes)
    assert [r.inputs["task"] for r in found.records] == ["smoke_questions"]
    cure.touch()
    again = Watch()
    assert not workers.run_all([asked], again).failed
    assert sorted(again.done) == ["faulty-dense", "poison-dense"]
    assert not [*(tmp_path / "out" / "failed").iterdir()]


@pytest.mark.process
def test_an_interrupted_run_leaves_no_worker_and_no_mark(saved_llama, tmp_path, monkeypatch):
    processes = []

    def look(sweep):
        if [*(tmp_path / "out").glob("failed/*")]:  # a cell is under way
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Sweep, "look", look)
    monkeypatch.setattr(workers, "_worker", lambda *asked, stock=workers._worker: _kept(stock(*asked), processes))
    with pytest.raises(KeyboardInterrupt):
        run_all([config(saved_llama, tmp_path / "out", workers=2)], Watch())
    assert len(processes) == 2 and all(p.poll() is not None for p in processes)
    assert not [*(tmp_path / "out").glob("failed/*")]
    monkeypatch.undo()
    assert len(run_local(config(saved_llama, tmp_path / "out"), Watch()).records) == 3


@contextlib.contextmanager
def _kept(worker, processes):
    with worker as process:
        processes.append(process)
        yield process


@pytest.mark.parametrize(("options", "word"), [
    ({"workers": 0}, "workers"), ({"workers": 2, "device_map": "auto"}, "--device-map"),
    ({"workers": 2, "device": "cuda:1"}, "cuda:1"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(tmp_path, options, word):
    with pytest.raises(UserError, match=word):
        config("tiny", tmp_path / "out", **options)


@pytest.mark.slow
def test_what_workers_cannot_begin_this_process_does_or_says_why(saved_llama, tmp_path, monkeypatch):
    """They die before their first cell; they are not started again, and the run does not end without a word."""
    starts = []

    @contextlib.contextmanager
    def dead(*_):
        starts.append(1)
        yield SimpleNamespace(poll=lambda: 1)

    monkeypatch.setattr(workers, "_worker", dead)
    view = Watch()
    found = run_all([config(saved_llama, tmp_path / "out", workers=2)], view)
    assert len(starts) == 2 and len(found.records) == 3 and len(view.begun) == 3
    assert [note for note in view.notes if "died (status 1)" in note]


def test_a_folder_of_logs_that_cannot_be_written_is_a_line(saved_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_all([config(saved_llama, tmp_path / "out", workers=2)], Watch())
