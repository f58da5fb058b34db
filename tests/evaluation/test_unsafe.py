"""Tasks run nothing of the working directory, and nothing that the model writes, unless told."""

import builtins
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import lm_eval
import pytest
from datasets import load_dataset

import dart_eval
from dart_eval.cluster import run as cluster
from dart_eval.evaluation.evaluate import _simple_evaluate
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.tasks import Tasks
from dart_eval.evaluation.unsafe import block_local_code
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import command

METRIC = """
from pathlib import Path
import datasets
import evaluate
Path({!r}).touch()
TEXT = datasets.Value("string")
class Own(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": datasets.Sequence(TEXT), "references": TEXT}})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, predictions, references, k):
        return {{"pass@1": 1.0}}, {{}}
"""
ROW = {
    "task_id": "HumanEval/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
    "test": "def check(f): pass", "entry_point": "one",
}  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A working directory with a metric of the name that humaneval loads; it leaves a mark where it runs."""
    for name in [n for n in sys.modules if "humaneval" in n or "code_eval" in n]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "work" / "code_eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("code_eval/code_eval.py").write_text(METRIC.format(str(tmp_path / "ran")))
    return tmp_path / "ran"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "openai__openai_humaneval" / "default"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path / "data"


@pytest.mark.slow  # the index of all tasks
@pytest.mark.parametrize("task", ["humaneval", "humaneval_instruct", "mbpp"])
def test_a_task_that_runs_generated_code_is_refused_before_anything_of_it_runs(task, marker, data, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("dart_eval.sweep.run.resolve", lambda spec: SimpleNamespace(load_tokenizer=None))
    done = command("run", "--tasks", task, "--data-dir", data, "--model", "m")
    assert done.code == 2 and "--confirm-run-unsafe-code" in done.err
    assert not marker.exists()


@pytest.mark.slow
def test_with_the_users_word_such_a_task_runs(marker, data, monkeypatch):
    told = {}

    def note(**given):
        told.update(given, allowed=os.environ["HF_ALLOW_CODE_EVAL"])

    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(lm_eval, "simple_evaluate", note)
    config = config_from(None, {"tasks": "humaneval", "data_dir": str(data), "confirm_run_unsafe_code": True})
    shelf = Tasks(config.data_dir, config.confirm_run_unsafe_code)
    (task,) = shelf.load("humaneval")
    assert marker.exists()
    # `evaluate_cell` would first score; what lm-eval is handed shows only here.
    _simple_evaluate(None, shelf, [task], EvalSettings())
    assert (told["confirm_run_unsafe_code"], told["allowed"]) == (True, "1")
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@pytest.mark.parametrize("imported", [True, False])
@pytest.mark.parametrize("swallowed", [True, False])
def test_other_metrics_of_the_working_directory_are_refused(marker, swallowed, imported, monkeypatch):
    for name in [] if imported else [n for n in sys.modules if n.partition(".")[0] == "evaluate"]:
        monkeypatch.delitem(sys.modules, name)
    stock = builtins.__import__

    def load():
        try:
            importlib.import_module("evaluate").load("code_eval")
        except UserError as error:  # as several tasks do: they say that a package is missing
            if not swallowed:
                raise ImportError("install what the task needs") from None
            raise error

    with pytest.raises((UserError, ImportError)) as said, block_local_code("task other", False):  # noqa: SIM117
        with block_local_code("task french", False):
            load()
    assert "task french" in str(said.value if swallowed else said.value.__context__)
    assert not marker.exists() and builtins.__import__ is stock
    kind = sys.modules["evaluate.loading"].LocalEvaluationModuleFactory
    assert "path" in inspect.signature(kind.__init__).parameters and kind.__init__.__module__ == "evaluate.loading"


def test_a_refused_metric_is_named_whatever_the_task_makes_of_the_error():
    refusal, error = UserError("task x would load ./m", "start elsewhere"), ImportError("install evaluate")
    error.__context__ = refusal
    assert Tasks()._explain("x", error) is refusal


def test_a_folder_of_a_data_sets_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "test.jsonl").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\./org/set"), block_local_code("task some", False):
        load_dataset("org/set")
    with block_local_code("task some", False):  # local data by a full path are meant
        assert load_dataset(str(tmp_path / "org" / "set"))["test"]["a"] == [1]


def test_metrics_of_the_working_directory_do_not_run_while_answers_are_scored(marker, monkeypatch):
    """Some tasks load them only then."""
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: evaluate.load("code_eval"))
    shelf = Tasks()
    with pytest.raises(UserError, match="smoke_questions would load"):  # before any model answers: see above
        _simple_evaluate(None, shelf, shelf.load("smoke_questions"), EvalSettings())
    assert not marker.exists()


def test_ray_is_not_started_in_the_working_directory(marker, monkeypatch):
    """Its workers import from there first."""
    ray, started = pytest.importorskip("ray"), []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: started.append(Path.cwd()))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    here = Path.cwd()
    # Whatever runs on Ray connects by this, and would start a cluster.
    with cluster._connected("local"):
        assert Path.cwd() == here
    assert started == [Path(dart_eval.__file__).parents[1]]
