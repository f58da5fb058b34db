"""`--workers N`: processes on one machine share the cells of a run, whatever becomes of them."""

import dataclasses
import io
import os
import pickle
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from dart_eval.cluster.run import run_all
from dart_eval.sweep import jobs, local, workers
from dart_eval.sweep.config import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Forked, Watch, results, run_local

pytestmark = pytest.mark.usefixtures("forked")
SWEEP = {"method": "dense,griffin,dart", "sparsity": "0.5", "limit": 6, "batch_size": 2, "tasks": "smoke_questions"}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: [" a", " b"]
process_results: !function {name}.judge
metric_list: [{{metric: acc}}]
"""
CODE = """
import os
def judge(doc, results):
    {what}
    return {{"acc": 1.0}}
"""


@pytest.fixture
def forked(request, monkeypatch):
    """Workers begin at once, but for one test, whose workers are started as a user's are."""
    if "files_are_those" not in request.node.name:
        monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=Forked, PIPE=-1))


def config(model, output, **changes):
    return config_from(None, {**SWEEP, "model": model, "output": str(output), **changes})


def broken_task(folder, name, what):
    """A task whose answers cannot be judged."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    (folder / f"{name}.py").write_text(CODE.format(what=what))
    (folder / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return {"include_path": str(folder), "confirm_run_unsafe_code": True}


@pytest.mark.process
def test_the_files_are_those_of_one_process_and_each_cell_is_made_once(saved_llama, tmp_path):
    run_local(config(saved_llama, tmp_path / "one"), Watch())
    view = Watch()
    found = run_all([config(saved_llama, tmp_path / "two", workers=2)], view)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert sorted(view.begun) == sorted(view.done) and len(view.done) == 3
    assert [r.inputs["method"] for r in found.records] == ["dense", "griffin", "dart"]  # in the plan's order


@pytest.mark.process
def test_a_killed_worker_is_replaced_and_nothing_is_lost(saved_llama, tmp_path, monkeypatch):
    """The first process that begins a cell is killed in it."""
    killed = []

    class View(Watch):
        def started(self, cell, requests):
            super().started(cell, requests)
            if not killed:
                (worker,) = (w for w in held[0].workers.values() if w.at is not None)
                killed.append(worker.process.pid)
                os.kill(worker.process.pid, signal.SIGKILL)

    held, stock = [], workers._Workers.__enter__
    monkeypatch.setattr(workers._Workers, "__enter__", lambda self: held.append(self) or stock(self))
    view = View()
    found = run_all([config(saved_llama, tmp_path / "out", workers=2)], view)
    assert killed and len(found.records) == 3 and not found.failed
    assert any("died at smoke_questions" in note and "signal 9" in note for note in view.notes)
    again = Watch()
    assert len(run_all([config(saved_llama, tmp_path / "out", workers=2)], again).records) == 3
    assert again.begun == []
    forced = Watch()
    run_all([config(saved_llama, tmp_path / "out", workers=2, force=True)], forced)
    assert len(forced.done) == 3


@pytest.mark.process
def test_a_cell_that_kills_its_processes_fails_and_so_does_a_faulty_one_once(saved_llama, tmp_path):
    settings = broken_task(tmp_path / "tasks", "poison", "os.kill(os.getpid(), 9)")
    broken_task(tmp_path / "tasks", "faulty", "raise ValueError('no judge')")
    view, tasks = Watch(), "poison,faulty,smoke_questions"
    asked = config(saved_llama, tmp_path / "out", workers=2, tasks=tasks, method="dense", **settings)
    found = run_all([asked], view)
    assert {cell.task for cell in found.failed} == {"poison", "faulty"}
    problems = sorted((problem, where.read_text()) for _, problem, where in view.broken)
    assert len(problems) == 2 and "no judge" in problems[0][0] and "Traceback" in problems[0][1]
    assert problems[1][0] == problems[1][1] == "the process at work on it died 3 times (signal 9)"
    assert [r.inputs["task"] for r in found.records] == ["smoke_questions"]


@pytest.mark.process
def test_an_interrupted_run_leaves_no_worker(saved_llama, tmp_path):
    class Interrupted(Watch):
        def started(self, cell, requests):
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        run_all([config(saved_llama, tmp_path / "out", workers=2)], Interrupted())
    end = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.1)
    assert not set(threading.enumerate()) - before  # a thread ends with the process that it listens to
    assert len(run_all([config(saved_llama, tmp_path / "out", workers=2)], Watch()).records) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"workers": 0}, "--workers 0 must be at least 1"),
    ({"workers": 2, "executor": "ray"}, "--workers 2 does not work with --executor ray"),
    ({"workers": 2, "device_map": "auto"}, "--device-map does not work with --workers"),
    ({"workers": 2, "device": "cuda:1"}, "--device cuda:1 does not work with --workers"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        config("tiny", tmp_path / "out", **options)


@pytest.mark.parametrize("ended", ["finished", "failed"])
def test_cells_that_another_run_ends_meanwhile_are_taken_over(saved_llama, tmp_path, monkeypatch, ended):
    """No worker reports them, as each finds them done: the run must not start workers without end."""
    view, starts, begin = Watch(), [], workers._Workers._begin
    if ended == "finished":
        run_local(config(saved_llama, tmp_path / "other"), Watch())

    def slowly(self, place):
        starts.append(place)
        assert len(starts) < 5
        store, cells = self.sweep.store, [job.cell for job in self.sweep.todo]
        for cell in cells[:1]:
            if ended == "failed":
                store.failed(cell.name, cell.key, "in another run")
            else:
                shutil.copytree(tmp_path / "other", store.folder, dirs_exist_ok=True)
        begin(self, place)

    monkeypatch.setattr(workers._Workers, "_begin", slowly)
    found = run_all([config(saved_llama, tmp_path / "two", workers=2)], view)
    assert len(found.records) == (3 if ended == "finished" else 2) and len(found.failed) == (ended == "failed")


def planned(saved_llama, tmp_path, **changes):
    """A sweep of two processes, nothing done yet."""
    asked = config(saved_llama, tmp_path / "out", workers=2, **changes)
    return asked, jobs.begin_sweep([asked], Watch(), False)


def test_a_cell_that_nobody_runs_ends_the_wait(saved_llama, tmp_path, monkeypatch):
    """Workers that plan other cells find nothing to do, and end well."""
    monkeypatch.setattr(jobs, "POLL", 0.0)
    _, sweep = planned(saved_llama, tmp_path)
    with pytest.raises(UserError, match=r"nobody runs smoke_questions-dense.*run it without --workers"):
        sweep.work_through(lambda todo: None)
    job, looks = sweep.todo[0], []

    def work(todo):  # another process is at work on it, and ends
        looks.append(len(todo))
        if len(looks) == 6:
            sweep.failed += [job.cell for job in todo]

    with sweep.store.claim(job.cell.name, job.cell.key):
        sweep.work_through(work)
    assert len(looks) == 6


def test_another_cell_than_was_planned_ends_the_run(saved_llama, tmp_path):
    asked, sweep = planned(saved_llama, tmp_path)
    cell = sweep.todo[0].cell
    cell = dataclasses.replace(cell, inputs={**cell.inputs, "task_hash": "of other documents"})
    worker = workers._Worker(0, None)
    with pytest.raises(UserError, match="a worker has run another cell of smoke_questions than was planned"):
        workers._Workers(sweep, [asked], False)._take(worker, "finished", (cell,))


def test_what_is_no_report_ends_the_worker(saved_llama, tmp_path):
    """A library in C writes into the reports: the worker would wait for ever for someone to read on."""
    asked, sweep = planned(saved_llama, tmp_path)
    killed = []
    process = SimpleNamespace(stdout=io.BytesIO(b"MKL_VERBOSE oneMKL\n" * 9), kill=lambda: killed.append(True))
    worker, both = workers._Worker(0, process), workers._Workers(sweep, [asked], False)
    both._listen(worker)
    assert killed and both.heard.get_nowait() == (worker, None)


def test_notes_after_the_plan_are_reported():
    out = io.BytesIO()
    report = workers._Report(out)
    for what, *arguments in (("note", "of the plan"), ("planned", 3, 0), ("note", "a remark on the checkpoint")):
        getattr(report, what)(*arguments)
    assert pickle.loads(out.getvalue()) == ("note", ("a remark on the checkpoint",))


def test_a_worker_whose_run_was_killed_ends_and_fails_no_cell(saved_llama, tmp_path):
    """Who gives the command again at once would find its cells failed."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", buffering=0) as gone, pytest.raises(SystemExit):
        local.run_all([config(saved_llama, tmp_path / "out")], workers._Report(gone), since=time.time())
    assert not (tmp_path / "out" / "failed").exists()


def test_workers_that_die_without_a_cell_end_a_run_only_where_none_begins_any(saved_llama, tmp_path, monkeypatch):
    asked, sweep = planned(saved_llama, tmp_path)
    both = workers._Workers(sweep, [asked], False)
    monkeypatch.setattr(both, "_begin", lambda place: None)

    def dies():
        both.workers[0] = workers._Worker(0, SimpleNamespace(wait=lambda: -9))
        both._ended(both.workers[0])

    for _ in range(2):
        dies()
        dies()
        both._take(workers._Worker(1, None), "started", (sweep.todo[0].cell, 6))
    dies()
    dies()
    with pytest.raises(UserError, match="workers died before their first cell"):
        dies()
    both.deaths.clear()
    sweep.failed += [job.cell for job in sweep.todo]
    for _ in range(3):  # each as it ends: nothing is left to do
        dies()


def test_a_folder_of_logs_that_cannot_be_written_is_a_line(saved_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_all([config(saved_llama, tmp_path / "out", workers=2)], Watch())
