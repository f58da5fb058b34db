"""README, docs, notebook and action: commands run on a tiny model, or are ones that the command line understands.

`make demo`, which CI runs, shows the same on the demo model.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
import typer
import yaml
from lm_eval._cli.harness import HarnessCLI
from transformers import AutoTokenizer

from dart_eval.bench import shapes
from dart_eval.cli import application
from dart_eval.kernels.cpu import build
from dart_eval.models import demo_model
from dart_eval.results.check import load_baseline
from dart_eval.sweep.options import DEFAULTS, config_from
from dart_eval.sweep.paper import load
from dart_eval.util.files import cache_dir
from tests.helpers.commands import ROOT, command, program
from tests.helpers.models import hooked, tiny

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NOTEBOOK = nbformat.read(ROOT / "notebooks" / "dart-eval.ipynb", 4)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def commands(text):
    """Lines of `dart-eval`, continued lines joined, without their comments."""
    return re.findall(r"(?:^|bin/)(dart-eval .*?)(?:  #.*)?$", re.sub(r"\\?\n\s+(?=--)", " ", text), flags=re.M)


@pytest.fixture(scope="module")
def small(tmp_path_factory, saved_llama):
    """A cache where a tiny model stands for the demo model; its kernels are compiled already."""
    cache = tmp_path_factory.mktemp("cache")
    if build.why_no_kernel() is None and (cache_dir() / "kernels").is_dir():
        shutil.copytree(cache_dir() / "kernels", cache / "kernels")
    folder = shutil.copytree(saved_llama, cache / demo_model.place().name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return cache


@pytest.mark.process
@pytest.mark.slow
def test_the_commands_of_the_first_pages_run_in_their_order(small, tmp_path, monkeypatch, demo_installed):
    """Each verb's first one as a process."""
    first, lines = (commands("\n".join(blocks(page, "console"))) for page in ("README.md", "docs/start.md"))
    assert {*first} <= {*lines} and len(lines) >= 15
    monkeypatch.setenv("DART_EVAL_CACHE", str(small))
    monkeypatch.setitem(shapes.SHAPES, "llama-3.1-8b", lambda shape=tiny("llama").config: shape)
    monkeypatch.chdir(tmp_path)
    begun = set()
    for line in (*lines, lines[0]):
        words = [*shlex.split(line)[1:], *(("--prompt", "16") if "decode" in line else ())]
        done = command(*words) if words[0] in begun else program(*words)
        code, out, said = done if words[0] in begun else (done.returncode, done.stdout, done.stderr)
        assert code == 0 and out.strip(), (line, said)
        assert not re.search("(?i)error|warning|traceback", said), (line, said)
        begun.add(words[0])
    assert "done " not in said  # the first run's cells were finished already


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/recipes.md"])
def test_python_runs_as_printed(small, tmp_path, monkeypatch, capsys, page, demo_installed):
    monkeypatch.setenv("DART_EVAL_CACHE", str(small))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    said = capsys.readouterr().out.splitlines()
    if page == "docs/python.md":
        values = {(row["key"], row["metric"], row["value"]) for row in names["rows"]}
        assert values < {*names["frame"][["key", "metric", "value"]].itertuples(index=False, name=None)}
        assert len(names["documents"]) == 4 * names["frame"].key.nunique() and set(names["documents"].acc) <= {0, 1}
    else:  # 0.7 of 19 of 20 tokens: the first is the prefill's
        assert float(said[-1]) == pytest.approx(0.665, abs=0.02) and not hooked(names["session"].model)


@pytest.mark.slow
def test_the_notebook_runs(small, tmp_path, monkeypatch, demo_installed):
    """With a tiny model for the demo model and for the reader's own, which beats no guessing: so without a picture."""
    monkeypatch.setenv("DART_EVAL_CACHE", str(small))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in [cell for cell in NOTEBOOK.cells if cell.cell_type == "code" and "svg" not in cell.source.lower()]:
        assert not cell.outputs
        if "your-model" in cell.metadata.get("tags", ()):
            names |= {"MODEL": demo_model.ALIAS, "DTYPE": "float32"}
        elif not cell.source.startswith("%"):
            exec(compile(cell.source, "notebook", "exec"), names)
        for line in commands(cell.source):
            assert command(*shlex.split(line)[1:]).code == 0, line
    assert len(names["rows"]) >= 9 and (tmp_path / "mine" / "report.html").is_file()


def test_commands_are_understood():
    """By the command line, whose verbs do nothing here."""
    found = typer.main.get_command(application())
    for verb in found.commands.values():
        for one in (verb, *getattr(verb, "commands", {}).values()):
            one.callback = None if hasattr(one, "commands") else lambda **given: given
    for line in [line for page in PAGES for line in commands("\n".join(blocks(page, "(?:sh|yaml|console)")))]:
        words = shlex.split(line)[1:]
        if words[0] == "lm-eval":  # whose parser knows its own
            HarnessCLI()._parser.parse_args(["run", *words[1:]])
            continue
        given = found(words, standalone_mode=False)
        if words[0] == "run":  # but for paths, which are the reader's
            known = {*DEFAULTS} - {"data_dir", "include_path", "calibration"}
            config_from(None, {k: v for k, v in given.items() if k in known and v not in (None, ())})


def test_files_of_the_docs_are_understood(tmp_path):
    (options,), recipes = blocks("docs/options.md", "yaml"), blocks("docs/recipes.md", "yaml")
    (paper,) = (block for block in recipes if block.startswith("about:"))
    (tmp_path / "run.yaml").write_text(options)
    config = config_from(tmp_path / "run.yaml", {"limit": 3})
    assert (config.sparsity, config.limit, config.model) == ((0.5, 0.6, 0.7), 3, "./my-model")
    (tmp_path / "mine.yaml").write_text(paper)
    assert load(str(tmp_path / "mine.yaml"), config_from(None, {"method": "dense", "sparsity": "0"})).sheets


def test_the_rows_of_the_readme_are_rows_of_the_board():
    row = r"^\| (\d+) % \|.*? `?([a-z][^|`]*?)(?: at \d+ %|`.*)? \| (\S+x)"
    pages = ROOT / "README.md", ROOT / "results" / "board.md"
    shown, board = (re.findall(row, page.read_text("utf-8"), re.M) for page in pages)
    assert 4 <= len(shown) <= 7 and {*shown} <= {*board}


def test_the_regression_sweep_fits_its_baseline():
    config = config_from(ROOT / "scripts" / "regression.yaml", {})
    cells = load_baseline(ROOT / "results" / "regression-baseline.json")
    asked = {(c.inputs["task"], c.inputs["method"], c.inputs["sparsity"], c.inputs["limit"]) for c in cells}
    assert asked == {
        (task, method, 0.0 if method == "dense" else s, config.limit)
        for task in config.tasks for method in config.method for s in config.sparsity
    }  # fmt: skip


# -- what is shipped around the package --------------------------------------------------------------------------------

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


# In the place of the program: this process runs what it was asked for, and says how that ended.
STANDS_IN = """#!/bin/sh
printf '%s\\0' "$@" > asked
read status < ended
exit $status
"""


@pytest.mark.slow
def test_the_action_runs_passes_and_fails_with_the_check(saved_llama, tmp_path, monkeypatch):
    """By bash, its inputs in the environment, as a runner does; a file's name would break a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("dart-eval").write_text(STANDS_IN)
    Path("dart-eval").chmod(0o755)
    os.mkfifo("asked")
    os.mkfifo("ended")
    asked = os.open("asked", os.O_RDWR | os.O_NONBLOCK)

    def step(name, **given):
        values = {f"inputs.{key}": given.get(key, field.get("default")) for key, field in ACTION["inputs"].items()}
        (found,) = [s for s in ACTION["runs"]["steps"] if s.get("name") == name]
        env = {key: re.sub(r"\$\{\{ (\S+) \}\}", lambda m: values[m[1]], value) for key, value in found["env"].items()}
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", found["run"]]
        process, out = subprocess.Popen(words, env={**os.environ, **env}), ""
        while process.poll() is None:
            with contextlib.suppress(BlockingIOError):
                done = command(*os.read(asked, 10_000).decode().split("\0")[:-1])
                Path("ended").write_text(f"{done.code}\n")
                out += done.out
            time.sleep(0.01)
        return process.returncode, out

    config = "a $(touch pasted).yaml"
    options = {"model": saved_llama, "tasks": "smoke_questions", "method": ["dense", "griffin"], "limit": 4}
    Path(config).write_text(yaml.safe_dump(options))
    assert step("Run", config=config, args="--limit 3\n--sparsity 0.4\n")[0] == 0
    results = Path(ACTION["inputs"]["output"]["default"])
    (pruned,) = (results / "cells").glob("*griffin*.json")
    assert json.loads(pruned.read_text())["inputs"]["sparsity"] == 0.4
    assert command("check", results, "--baseline", "base line.json", "--update").code == 0
    assert step("Check", config=config, baseline="base line.json")[0] == 0
    assert {"report.html", "junit.xml"} <= {file.name for file in results.iterdir()}
    pruned.unlink()
    code, out = step("Check", config=config, baseline="base line.json")
    os.close(asked)
    assert code == 1 and "::error" in out and not Path("pasted").exists()


def test_no_script_of_ours_has_a_value_pasted_into_it():
    """What a pull request can choose reaches a shell through its environment alone, and a workflow may only read."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    workflows = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in workflows)
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    scripts = [s["run"] for part in (*jobs, ACTION["runs"]) for s in part["steps"] if "run" in s]
    assert len(scripts) >= 9 and not [script for script in scripts if re.search(r"\$\{\{ (?!matrix)", script)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert {name for script in scripts for name in re.findall(r"^make ([\w-]+)", script, flags=re.M)} <= targets
