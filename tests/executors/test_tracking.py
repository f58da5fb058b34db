"""Logging to wandb through lm-eval's logger: what is sent, and that a tracker can never cost a result."""

import sys
import types

import lm_eval.loggers
import pytest

from dart_eval.pruning.registry import make
from dart_eval.results.record import Metric, Record
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.plan import Cell
from dart_eval.sweep.tracking import MAX_FAILURES, tracked
from dart_eval.util.errors import UserError

CONFIG = RunConfig(output="some/folder/sweep", log="wandb", log_project="proj")


def cell(task="arc"):
    """A cell of a group with one member, and its record."""
    method = make("dart")
    inputs = {
        "model": {"name": "tiny"}, "method": "dart", "params": method.params(), "sparsity": 0.5, "task": task,
        "limit": 3, "scope": "scored",
    }  # fmt: skip
    metrics = [
        Metric(task, "acc", 0.5, 0.1, 3, True), Metric("member", "acc", 0.75, None, 3, True, part_of=task),
    ]  # fmt: skip
    record = Record(
        key="k", inputs=inputs, metrics=metrics, mask_sparsity=0.5, effective_sparsity=0.45, weights_read=0.5,
        tokens=12, remasks=1, flops={"prefill": 5.0}, memory={"state": 100}, settings={}, environment={},
        measured={"seconds": 1.5, "created": "", "peak": 1},
    )  # fmt: skip
    return Cell(method, 0.5, task, inputs), record


class View:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))

    @property
    def notes(self):
        return [args[0] for name, *args in self.calls if name == "note"]


class Logger:
    """lm-eval's logger as far as it is used; `fail` names the calls that raise."""

    made, fail = [], ()

    def __init__(self, options):
        print("chatter")
        self.made.append(self)
        self.options, self.ended, self.run, self.summary = options, 0, self, {}
        self._try("init")

    def _try(self, name):
        if name in self.fail:
            raise OSError("no route\nto host")

    def post_init(self, results):
        self.results = results

    def log_eval_result(self):
        self._try("log")

    def finish(self):
        self.ended += 1
        self._try("finish")


@pytest.fixture
def wandb(monkeypatch):
    """A stub of wandb: whether it can log in, and its mode."""
    module = types.ModuleType("wandb")
    module.Settings, module.mode, module.inside = dict, "online", True
    module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=module.mode))

    def login(prompt):
        assert prompt is False  # or it would wait for an answer
        if isinstance(module.inside, Exception):
            raise module.inside
        return module.inside

    module.login = login
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(lm_eval.loggers, "WandbLogger", Logger)
    monkeypatch.setattr(Logger, "made", [])
    return module


def test_a_cell_is_a_run_in_lm_evals_form(wandb, capsys):
    view = View()
    tracking = tracked(view, CONFIG)
    tracking.something_new("later")
    for task in ("arc", "xsum"):
        tracking.started(cell(task)[0], 3)
        tracking.finished(*cell(task))
    tracking.finished(*cell("of another process"))
    called = ["something_new", "started", "finished", "started", "finished", "finished"]
    assert [name for name, *_ in view.calls] == called
    first, second = Logger.made
    assert (first.options["project"], first.options["group"]) == ("proj", "sweep")
    assert (first.options["name"], second.options["name"]) == ("arc dart 50 %", "xsum dart 50 %")
    assert first.options["config"]["sparsity"] == 0.5
    assert first.results["results"]["arc"]["acc,none"] == 0.5
    assert first.results["results"]["arc"]["acc_stderr,none"] == 0.1
    assert first.results["group_subtasks"] == {"arc": ["member"]}
    assert (first.summary["read"], first.summary["seconds"], first.summary["flops"]) == (0.5, 1.5, {"prefill": 5.0})
    assert [logger.ended for logger in Logger.made] == [1, 1]
    assert capsys.readouterr().out == ""  # the view is all that prints


def test_no_tracker_is_the_view_itself():
    view = View()
    assert tracked(view, RunConfig()) is view


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_tracker_costs_nothing_is_noted_once_and_left_alone(wandb, monkeypatch, where):
    monkeypatch.setattr(Logger, "fail", (where,))
    view = View()
    tracking = tracked(view, CONFIG)
    tracking.started(cell()[0], 3)
    for _ in range(MAX_FAILURES + 2):
        tracking.finished(*cell())
    (note,) = view.notes
    assert "OSError: no route to host" in note and "results are in the output folder" in note
    assert [name for name, *_ in view.calls].count("finished") == MAX_FAILURES + 2
    assert len(Logger.made) == MAX_FAILURES
    assert all(logger.ended == (where != "init") for logger in Logger.made)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--log wandb needs the package wandb; pip install 'dart-eval\[wandb\]'"):
        tracked(View(), CONFIG)


@pytest.mark.parametrize("inside", [False, OSError("no network")])
def test_wandb_is_asked_beforehand_whether_it_can_log_in(wandb, inside):
    wandb.inside = inside
    with pytest.raises(UserError, match=r"(no API key|no network).*; `wandb login`, or set WANDB_MODE=offline"):
        tracked(View(), CONFIG)
    wandb.mode = "offline"
    tracking = tracked(View(), CONFIG)
    tracking.started(cell()[0], 3)
    tracking.finished(*cell())
    assert len(Logger.made) == 1
