"""How a command begins: names of tasks without lm-eval, and a view that a signal may end at any moment."""

import contextlib
import re
import threading
from typing import get_args

import pytest
import yaml
from lm_eval.tasks import TaskManager

from dart_eval.cli import view
from dart_eval.evaluation import task_names
from dart_eval.evaluation.lm import PERPLEXITY_CHUNK
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models.loading import DTYPES
from dart_eval.sweep.events import Event
from dart_eval.sweep.options import DEFAULTS, HINTS, SCOPES


def test_what_an_option_may_be_is_what_the_code_takes():
    assert (get_args(HINTS["scope"]), get_args(HINTS["dtype"])) == (SCOPES, tuple(DTYPES))
    assert DEFAULTS["chunk"] == PERPLEXITY_CHUNK


@pytest.mark.slow  # lm-eval's index
def test_the_names_are_those_of_lm_evals_index_from_the_cache_and_before_there_is_one(tmp_path, monkeypatch):
    stock = TaskManager(include_path=[task_names.tasks_dir()])
    stock_index = {str(name): entry for name, entry in stock.task_index.items()}
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path))
    own, made, found = TaskManager(), [], []  # lm-eval's own tasks: a look takes seconds
    for damage in (None, None, "{", '{"state": 1}', '{"state": "x", "index": {"a": 5}}'):
        if damage:
            (file,) = tmp_path.glob("tasks-*.json")
            file.write_text(damage.replace("x", task_names._state(str(task_names.lm_evals_dir()))))
        task_names.lm_evals.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr("lm_eval.tasks.TaskManager", lambda: made.append(1) or own)
            found.append(task_names.names())
    task_names.lm_evals.cache_clear()
    assert all(names == {*stock_index} for names in found) and len(made) == 4
    tasks = Tasks()
    tasks.index_all()
    for name, entry in tasks.manager.task_index.items():
        theirs = stock_index[name]
        assert (entry.kind, entry.yaml_path, entry.tags) == (theirs.kind, theirs.yaml_path, theirs.tags), name


def test_a_changed_file_is_noticed(tmp_path):
    (tmp_path / "one.yaml").write_text("task: one")
    before = task_names._state(str(tmp_path))
    assert task_names._state(str(tmp_path)) == before
    (tmp_path / "one.yaml").write_text("task: three")
    assert task_names._state(str(tmp_path)) != before


def test_every_shipped_name_is_known():
    files = [file for file in task_names.tasks_dir().rglob("*.yaml") if not file.name.startswith("_")]
    tasks = [yaml.safe_load(re.sub("!function", "", file.read_text(encoding="utf-8"))) for file in files]
    assert {*task_names.own()} == {task.get("group") or task["task"] for task in tasks}
    assert task_names.expand(["smoke_drift", "arc"]) == ["smoke_drift", "arc_easy", "arc_challenge"]


def test_a_signal_while_a_line_is_called_off_leaves_nothing_locked(monkeypatch):
    """It may come between a lock and the block that lets go of it, and the view is left afterwards."""

    def taken(lock):
        threading.Condition._real(lock)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), view.TerminalView() as shown:
        shown(Event("wait", "loading a model"))
        monkeypatch.setattr(threading.Condition, "_real", threading.Condition.__enter__, raising=False)
        monkeypatch.setattr(threading.Condition, "__enter__", taken)
        try:
            shown(Event("planned", of=1))
        finally:
            monkeypatch.setattr(threading.Condition, "__enter__", threading.Condition._real)
