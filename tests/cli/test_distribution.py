"""What is shipped around the package: the action's steps, the notebook and the site are run; workflows are looked at.

`make check` lints workflows, action and Dockerfile; `make wheel` builds the package and runs it where nothing else is.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.helpers.commands import ROOT, command

pytestmark = [pytest.mark.process, pytest.mark.slow]
BIN = Path(sys.executable).parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOTEBOOK = ROOT / "notebooks" / "dart-eval.ipynb"


# -- the action --------------------------------------------------------------------------------------------------------


@pytest.fixture
def step(tmp_path):
    """Runs a step of the action as a runner does: in the workspace, by bash, its inputs in the environment."""

    def go(name, **given):
        values = {
            key: given.get(key.replace("-", "_"), field.get("default")) for key, field in ACTION["inputs"].items()
        }
        values = {f"inputs.{key}": value for key, value in values.items()} | {"github.action_path": str(ROOT)}
        (found,) = [s for s in ACTION["runs"]["steps"] if s.get("name") == name]
        env = {key: re.sub(r"\$\{\{ (\S+) \}\}", lambda m: values[m[1]], value) for key, value in found["env"].items()}
        env |= {"PATH": f"{BIN}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
        script = tmp_path / "step.sh"
        script.write_text(found["run"])
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", script]
        return subprocess.run(words, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)

    return go


@pytest.fixture
def config(tmp_path, saved_llama):
    """A run of two cells; its name would break a script that it is pasted into."""
    options = {
        "model": saved_llama, "tasks": "smoke_questions", "method": ["dense", "griffin"], "sparsity": 0.5, "limit": 4,
    }  # fmt: skip
    file = tmp_path / "a $(touch pasted).yaml"
    file.write_text(yaml.safe_dump(options))
    return file.name


def test_the_action_installs_itself(step, tmp_path, monkeypatch):
    """Into a folder of the test's, without what it depends on."""
    for name, value in {"TARGET": "installed", "NO_DEPS": "1", "NO_BUILD_ISOLATION": "0", "NO_INDEX": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    done = step("Install")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed" / "dart_eval" / "tasks").is_dir()
    assert "dart-eval[demo]==9.9.9" in step("Install", version="9.9.9").stderr.replace(" ", "")


def test_the_action_passes_and_fails_with_the_check(step, config, tmp_path):
    ran = step("Run", config=config, args="--limit 3\n--sparsity 0.4\n")
    assert ran.returncode == 0, ran.stderr
    results = tmp_path / ACTION["inputs"]["output"]["default"]
    assert command("check", results, "--baseline", tmp_path / "base line.json", "--update").code == 0

    checked = step("Check", config=config, baseline="base line.json")
    assert checked.returncode == 0, checked.stderr
    assert "of 4 rows of base line.json 0 fell, 0 missing" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert len(list(ElementTree.parse(results / "junit.xml").iter("testcase"))) >= 2
    assert (results / "report.html").is_file()

    next(file for file in (results / "cells").glob("*.json") if "griffin" in file.name).unlink()
    (tmp_path / "limits.yaml").write_text("recovery: 0.9\n")
    failed = step("Check", config=config, baseline="base line.json", thresholds="limits.yaml")
    assert failed.returncode == 1 and "::error" in failed.stdout
    assert not (tmp_path / "pasted").exists()


def test_ctrl_c_ends_the_script_of_the_board_and_an_error_does_not(tmp_path):
    """The tool ends with 130 then, as `dart-eval` does."""
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho >> calls\n[ $(wc -l < calls) -eq 2 ] && exit 130\nexit 2\n")
    tool.chmod(0o755)
    words = ["bash", ROOT / "scripts" / "board.sh", "model", "data", "out"]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"DART_EVAL": str(tool)}, capture_output=True, text=True
    )
    assert done.returncode == 130 and done.stderr.count("ended with status 2") == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_no_script_has_a_value_pasted_into_it():
    """What a pull request can choose reaches a shell through its environment alone."""
    jobs = [job for file in WORKFLOWS for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values()]
    steps = [s for part in (*jobs, ACTION["runs"]) for s in part["steps"]]
    scripts = [s["run"] for s in steps if "run" in s]
    assert len(scripts) >= 9 and not [s for s in scripts if "${{" in s]


def test_workflows_call_targets_that_exist_and_may_do_nothing_by_default():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for file in WORKFLOWS:
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


# -- the notebook ------------------------------------------------------------------------------------------------------


def test_the_notebook_runs(demo_installed, tmp_path, monkeypatch):
    """All of it but the installation, with the demo model for the reader's own."""
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(NOTEBOOK, 4)
    assert not any(cell.get("outputs") for cell in book.cells)
    (mine,) = [cell for cell in book.cells if "your-model" in cell.metadata.get("tags", ())]
    mine.source = 'MODEL, DTYPE = "gemma-3-270m", "float32"'
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    boards = "".join(output.text for output in shown if output.output_type == "stream")
    assert len(re.findall(r"^ +30 % .*grinqh", boards, flags=re.M)) == 2
    assert any("image/svg+xml" in output.get("data", ()) for output in shown)
    assert (tmp_path / "mine" / "report.html").is_file()


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with every link checked."""
    folder = tmp_path_factory.mktemp("site")
    words = [BIN / "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("width", [390, 1280])
def test_the_board_of_the_site_sorts(site, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    page.goto((site / "board" / "index.html").as_uri())
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    table = page.locator("article table").first
    assert table.locator("tbody td:nth-child(2)").all_inner_texts()[0] == "dense"
    for i, order in (5, 1), (9, 1), (9, -1):  # perplexity x dense, speed today
        table.locator(f"thead th:nth-child({i}) button").click()
        texts = table.locator(f"tbody tr td:nth-child({i})").all_inner_texts()
        numbers = [order * float(found[0]) for text in texts if (found := re.match(r"[\d.]+", text))]
        assert len(numbers) >= 7 and numbers == sorted(numbers)
        assert not re.match(r"\d", texts[-1]) or len(numbers) == len(texts)  # those without a number come last
    page.close()
    assert not problems
