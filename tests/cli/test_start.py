"""How a command begins: help and wrong input at once, names of tasks without lm-eval, a word on what it waits for."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import typer
import yaml
from lm_eval.tasks import TaskManager

from dart_eval import cli
from dart_eval.cli import options, view
from dart_eval.evaluation import task_names
from dart_eval.evaluation.tasks import Tasks
from dart_eval.sweep.events import Event
from dart_eval.sweep.options import DEFAULTS, HINTS, OPTIONS
from dart_eval.util.errors import nearest
from tests.helpers.commands import command

ROOT = Path(__file__).resolve().parents[2]
QUICK = """
import sys
from dart_eval import cli
for words in (["-h"], ["run", "--help"], ["run", "--tasks", "smoke", "--method", "grifin"], ["run", "--sparsty", "0.5"],
              ["run", "--tasks", "helaswag"], ["run", "--tasks", "smoke", "--dtype", "flaot32"], ["ls", "tasks"],
              ["trace", "--method", "grifin"], ["bench", "decode", "--method", "grifin"],
              ["ls", "tasks", "--all"], ["run", "--tasks", "smoke", "--method", "grifin:remask=drift"],
              ["ls", "methods", "grifin"], ["run", "--tasks", "smoke", "--device", "gpu"],
              ["trace", "--device", "gpu"], ["bench", "decode", "--device", "gpu"], ["paper", "smok"]):
    sys.argv = ["dart-eval", *words]
    try:
        cli.main()
    except SystemExit:
        pass
    heavy = {"torch", "transformers", "lm_eval", "datasets", "matplotlib"} & {*sys.modules}
    heavy |= {"pandas"} & {*sys.modules} if words[0] != "paper" else set()  # which reads its numbers with it
    print("IMPORTED", words, heavy)
"""


@pytest.mark.process
def test_help_lists_and_wrong_names_import_nothing_heavy():
    task_names.lm_evals()  # in the cache from now on
    done = subprocess.run([sys.executable, "-c", QUICK], cwd=ROOT, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("IMPORTED")]
    assert len(said) == 16 and all(line.endswith("set()") for line in said), said
    assert "unknown method 'grifin'; did you mean griffin, grinqh?" in done.stderr
    assert "unknown task 'helaswag'; did you mean hellaswag" in done.stderr
    assert "dtype 'flaot32' must be 'auto', 'float32'" in done.stderr
    assert len(re.findall("device 'gpu' .*cuda:1 or mps", done.stderr)) == 3
    assert "error: no such option: --sparsty (Possible options: --sparsity); see dart-eval run -h" in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(("words", "said"), [
    (["rnu"], "no such command 'rnu'. Did you mean 'run'?"),
    (["run", "--seed"], "option '--seed' requires an argument; see dart-eval -h"),
    (["run", "-t", "a", "b"],
     "got unexpected extra argument(s) (b); give the model with --model, and tasks with commas: --tasks arc,hellaswag"),
    (["check", "out"], "missing option '--baseline'; see dart-eval check -h"),
    (["ls", "methods", "--foo"], "no such option: --foo; see dart-eval ls methods -h"),
    (["--model", "x"], "dart-eval needs a command before --model; did you mean dart-eval run --model?"),
    (["run", "--zzz", "5"], "no such option: --zzz; see dart-eval run -h"),
])  # fmt: skip
def test_words_that_no_command_takes_are_answered_in_one_line(words, said):
    done = command(*words)
    assert (done.code, done.out, done.err) == (2, "", f"error: {said}\n")


def test_a_suggestion_is_alike_or_there_is_none():
    assert nearest("--log-samples", ["--log-project", "--log", "--scope"] + ["--x"] * 20) == ""
    assert nearest("griffn", ["griffin"] + ["teal"] * 30) == "did you mean griffin?"


def test_without_words_the_help_is_shown():
    assert "Commands" in command().out and command("-h").code == 0


# -- help --------------------------------------------------------------------------------------------------------------


def _shown(monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    return command(*words).out


def test_the_help_of_run_fits_80_columns_in_panels(monkeypatch):
    shown = _shown(monkeypatch, "run", "-h")
    assert max(map(len, shown.splitlines())) <= 80
    panels = re.findall(r"^╭─ (\w+) ─", shown, flags=re.M)
    assert panels == ["Options", options.TASKS, options.PRUNING, options.MODEL, options.OUTPUT, options.CLUSTER]
    assert shown == _shown(monkeypatch, "run", "--help")


def _verbs(command, path=()):
    """Every verb, as the words that call it, and its help as written."""
    for name, verb in getattr(command, "commands", {}).items():
        yield (*path, name), verb.help or ""
        yield from _verbs(verb, (*path, name))


def test_the_help_of_every_verb_fits_80_columns_and_cuts_no_example(monkeypatch):
    verbs = dict(_verbs(typer.main.get_command(cli.application())))
    assert {("run",), ("ls", "tasks"), ("bench", "decode")} <= {*verbs}
    for words, text in verbs.items():
        lines = [line.strip(" │") for line in _shown(monkeypatch, *words, "-h").splitlines()]
        assert max(map(len, lines)) <= 80, words
        examples = [line.strip() for line in text.splitlines() if line.strip().startswith("dart-eval ")]
        assert [e for e in examples if e not in lines] == [], words


def test_every_option_of_a_run_is_in_its_help_and_says_what_it_means():
    found = {p.name: p for p in typer.main.get_command(cli.application()).commands["run"].params}
    assert {*DEFAULTS} <= {*found}
    for name in DEFAULTS:
        assert OPTIONS[name].help[-1] == "." and OPTIONS[name].help in found[name].help


def test_words_that_an_option_may_be_are_those_of_the_code():
    from dart_eval.evaluation.lm import PERPLEXITY_CHUNK
    from dart_eval.models.loading import DTYPES
    from dart_eval.sweep.options import SCOPES

    assert (get_args(HINTS["scope"]), get_args(HINTS["dtype"])) == (SCOPES, tuple(DTYPES))
    assert DEFAULTS["chunk"] == PERPLEXITY_CHUNK


def test_options_may_be_spelled_as_lm_eval_has_them():
    assert "limit '0' must be" in command("run", "--tasks", "smoke", "--num_fewshot", "5", "--limit", "0").err


@pytest.mark.process
def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dart_eval", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"dart-eval \d+\.\d+\.\d+\n", done.stdout)


# -- names of tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # lm-eval's index
def test_the_names_are_those_of_lm_evals_index_from_the_cache_and_before_there_is_one(tmp_path, monkeypatch):
    stock = TaskManager(include_path=[task_names.tasks_dir()])
    stock_index = {str(name): entry for name, entry in stock.task_index.items()}
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path))
    found = []
    for damage in (None, None, "{", '{"state": 1}', '{"state": "x", "index": {"a": 5}}'):
        if damage:
            (file,) = tmp_path.glob("tasks-*.json")
            file.write_text(damage.replace("x", task_names._state(str(task_names.lm_evals_dir()))))
        task_names.lm_evals.cache_clear()
        found.append(task_names.names())
    task_names.lm_evals.cache_clear()
    assert all(names == {*stock_index} for names in found)
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
    said = [yaml.safe_load(re.sub("!function", "", file.read_text(encoding="utf-8"))) for file in files]
    assert {*task_names.own()} == {told.get("group") or told["task"] for told in said}
    assert task_names.expand(["smoke_drift", "arc"]) == ["smoke_drift", "arc_easy", "arc_challenge"]


# -- what a run waits for ----------------------------------------------------------------------------------------------


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


def test_a_log_says_what_lasts_once_and_nothing_of_what_does_not(capsys, monkeypatch):
    monkeypatch.setattr(view, "LASTS", 0.05)
    with view.TerminalView() as shown:
        shown(Event("wait", "looking up tasks"))
        shown(Event("wait", "loading the model"))
        time.sleep(0.15)
        shown(Event("wait", "loading the model"))
        time.sleep(0.15)
        shown(Event("planned", of=1))
        shown(Event("wait", "waiting for another process"))
        shown(Event("planned", of=1))
        time.sleep(0.15)
    assert capsys.readouterr().err == "loading the model ...\n"


@pytest.mark.parametrize("live", [False, True])
def test_what_a_cell_waits_for_is_said_until_its_first_answers(capsys, monkeypatch, live):
    monkeypatch.setattr(view, "LASTS", 0.05)
    bars = []
    with view.TerminalView() as shown:
        shown.live = live
        shown(Event("planned", of=2))
        for cell in (SimpleNamespace(key=i, title=f"cell {i}") for i in range(2)):
            shown(Event("started", cell=cell))
            shown(Event("wait", "preparing dart"))
            time.sleep(0.15)
            shown(Event("wait", f"running {cell.title}"))
            bars.append(shown._bar is not None)
            shown(Event("answered", cell=cell, n=4, of=8))
            bars.append(shown._bar is not None)
            time.sleep(0.15)
            shown(Event("wait", "what does not last"))
            shown(Event("failed", "it fell", cell, where=Path("log")))
            time.sleep(0.1)
    assert bars == [live, False] * 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    each = ["preparing dart ...", "running cell 0 ...", "preparing dart ...", "running cell 1 ..."]
    assert said == ([] if live else each)
