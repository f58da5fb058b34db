"""Logging to wandb and trackio: what is sent, and that a tracker can never cost a result. Stubs stand for both."""

import sys
import types

import pytest

from dart_eval.pruning.registry import make
from dart_eval.results.record import Metric, Record
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.plan import Cell
from dart_eval.sweep.tracking import MAX_FAILURES, tracked
from dart_eval.util.errors import UserError

CONFIG = RunConfig(output="some/folder/sweep")


def cell(method=None, sparsity=0.5, task="arc", subject=0.75):
    """A cell of a group with one member, and its record."""
    method = method or make("dart")
    inputs = {
        "model": {"name": "tiny"}, "method": method.name, "params": method.params(), "sparsity": sparsity,
        "task": task, "limit": 3,
    }  # fmt: skip
    metrics = [
        Metric(task, "acc", 1 - sparsity, 0.1, 3, True), Metric(task, "words", 7.0, None, 3, None),
        Metric("member", "acc", subject, 0.2, 3, True, part_of=task),
    ]  # fmt: skip
    record = Record(
        key="k", inputs=inputs, metrics=metrics, mask_sparsity=sparsity, effective_sparsity=0.9 * sparsity,
        weights_read=1 - sparsity, tokens=12, remasks=1, flops={"prefill": 5.0, "context": "text"},
        memory={"weights": 100}, settings={}, environment={}, measured={"seconds": 1.5, "created": "", "peak": 1},
    )  # fmt: skip
    return Cell(method, sparsity, task, inputs), record


class View:
    """Remembers what it was told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))

    @property
    def notes(self):
        return [args[0] for name, *args in self.calls if name == "note"]


class Tracker(types.ModuleType):
    """The part of wandb's and trackio's API that is used; `fail` names calls that raise."""

    def __init__(self, kind, logged_in=True, mode="online"):
        super().__init__(kind)
        self.runs, self.fail, self.kind = [], set(), kind
        self.logged_in, self.asked, self.attempts = logged_in, 0, 0
        if kind == "wandb":
            self.Settings = lambda **options: options
            self.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))

    def login(self, prompt):
        assert prompt is False  # or it would wait for an answer
        self.asked += 1
        if isinstance(self.logged_in, Exception):
            raise self.logged_in
        return self.logged_in

    def init(self, **options):
        self.attempts += 1
        if "init" in self.fail:
            raise OSError("no route\nto host")
        print("chatter")
        run = (WandbRun if self.kind == "wandb" else TrackioRun)(self, options)
        self.runs.append(run)
        return run

    def finish(self):
        assert self.kind == "trackio"
        self.runs[-1].finish()


class TrackioRun:
    def __init__(self, module, options):
        self.module, self.options, self.rows, self.ended = module, options, [], []

    def log(self, row):
        if "log" in self.module.fail:
            raise RuntimeError("gone")
        assert not self.ended
        self.rows.append(row)

    def finish(self):
        if "finish" in self.module.fail:
            raise RuntimeError("gone")
        self.ended.append(None)


class WandbRun(TrackioRun):
    url, offline = "https://example.org/run", False

    def define_metric(self, name, step_metric=None):
        self.options.setdefault("axes", {})[name] = step_metric

    def finish(self, exit_code=None):
        super().finish()
        self.ended[-1] = exit_code


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    module = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_run_is_a_curve_against_sparsity(tracker, capsys):
    view = View()
    uniform = make("dart", {"allocation": "uniform", "remask": "never"})
    cells = [cell(make("dense"), 0.0), cell(sparsity=0.5), cell(sparsity=0.7), cell(uniform), cell(task="xsum")]
    with tracked(view, tracker.kind, "proj", CONFIG) as tracking:
        for made in cells:
            tracking.finished(*made)
    assert [(r.options["name"], [row["sparsity"] for row in r.rows]) for r in tracker.runs] == [
        ("arc dense", [0.0]),
        ("arc dart", [0.5, 0.7]),
        ("arc dart:remask=never:allocation=uniform", [0.5]),
        ("xsum dart", [0.5]),
    ]
    assert tracker.runs[1].rows[0] == {
        "sparsity": 0.5, "effective_sparsity": 0.45, "mask_sparsity": 0.5, "weights_read": 0.5, "seconds": 1.5,
        "tokens": 12, "remasks": 1, "arc/acc": 0.5, "arc/acc_stderr": 0.1, "arc/words": 7.0, "flops/prefill": 5.0,
        "memory/weights": 100,
    }  # fmt: skip
    config = tracker.runs[2].options["config"]
    assert (config["method"], config["params"]["allocation"], config["task"]) == ("dart", "uniform", "arc")
    assert "sparsity" not in config  # it is what varies
    assert {(r.options["project"], r.options["group"]) for r in tracker.runs} == {("proj", "sweep")}
    assert all(len(r.ended) == 1 for r in tracker.runs)
    if tracker.kind == "wandb":
        assert tracker.runs[0].options["axes"] == {"sparsity": None, "*": "sparsity"}
        assert [r.ended for r in tracker.runs] == [[0]] * 4
        assert tracker.runs[0].options["settings"] == {"silent": True, "console": "off"}
    assert len(view.notes) == 1  # where to look, said once
    assert ("https://example.org/run" if tracker.kind == "wandb" else "trackio show --project proj") in view.notes[0]
    assert capsys.readouterr().out == ""  # the view is all that prints


def test_everything_else_goes_to_the_view(tracker):
    view = View()
    with tracked(view, tracker.kind, "proj", CONFIG) as tracking:
        tracking.planned(3, 1)
        tracking.failed("cell", ValueError())
        tracking.something_new("later")
        tracking.finished(*cell())
    assert [name for name, *_ in view.calls] == ["planned", "failed", "something_new", "finished", "note"]


def test_no_tracker_is_the_view_itself():
    view = View()
    with tracked(view, None, "proj", CONFIG) as tracking:
        assert tracking is view


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_run_is_finished_after_an_error(tracker, error):
    def broken():
        with tracked(View(), tracker.kind, "proj", CONFIG) as tracking:
            tracking.finished(*cell())
            raise error

    with pytest.raises(error):
        broken()
    assert tracker.runs[0].ended == [1 if tracker.kind == "wandb" else None]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_tracker_costs_nothing_and_is_reported_once(tracker, where):
    view = View()
    with tracked(view, tracker.kind, "proj", CONFIG) as tracking:
        tracker.fail = {where}
        for task in ("a", "b"):
            tracking.finished(*cell(task=task))
    warnings = [n for n in view.notes if "failed" in n]
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert "results are in the output folder" in warnings[0]
    assert [name for name, *_ in view.calls].count("finished") == 2


def test_a_tracker_that_comes_back_is_used_again(tracker):
    view = View()
    with tracked(view, tracker.kind, "proj", CONFIG) as tracking:
        tracker.fail = {"log"}
        tracking.finished(*cell(sparsity=0.5))
        tracker.fail = set()
        tracking.finished(*cell(sparsity=0.7))
    assert [[row["sparsity"] for row in r.rows] for r in tracker.runs] == [[], [0.7]]


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_tracker_that_stays_away_is_left_alone(tracker, where):
    """Each attempt may wait for the network."""
    with tracked(View(), tracker.kind, "proj", CONFIG) as tracking:
        tracker.fail = {where}
        for _ in range(10):
            tracking.finished(*cell())
    assert tracker.attempts == MAX_FAILURES


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = r"--log wandb needs the package wandb; pip install 'dart-eval\[wandb\]'"
    with pytest.raises(UserError, match=error), tracked(View(), "wandb", "proj", CONFIG):
        pass
    with pytest.raises(UserError, match="tracker 'wndb' is unknown; did you mean wandb"):
        tracked(View(), "wndb", "proj", CONFIG).__enter__()


@pytest.mark.parametrize("logged_in", [False, OSError("no network")])
def test_wandb_is_asked_beforehand_whether_it_can_log_in(monkeypatch, logged_in):
    module = Tracker("wandb", logged_in)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"(no API key|no network).*; `wandb login`, or set WANDB_MODE=offline"):
        tracked(View(), "wandb", "proj", CONFIG).__enter__()
    offline = Tracker("wandb", logged_in, mode="offline")
    monkeypatch.setitem(sys.modules, "wandb", offline)
    with tracked(View(), "wandb", "proj", CONFIG) as tracking:
        tracking.finished(*cell())
    assert (offline.asked, len(offline.runs)) == (0, 1)
