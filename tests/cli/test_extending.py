"""docs/extending.md holds a whole package, and docs/methods.md what the registry knows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from dart_eval.kernels.cpu import build
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.registry import make, offered
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.plan import plan
from dart_eval.util.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"```\w+ file=(\S+)\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder into which the package of the page has been installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in BLOCK.findall(PAGE.read_text()):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def installed(package, monkeypatch):
    """This process finds the package, as any does that Python's own folder of packages is searched by."""
    monkeypatch.syspath_prepend(str(package))
    offered.cache_clear()
    yield
    offered.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "dart_often"]:
        del sys.modules[name]


def test_a_score_is_20_lines_and_a_choice_40():
    lengths = {name: len(text.strip().splitlines()) for name, text in BLOCK.findall(PAGE.read_text())}
    assert lengths["dart_often/score.py"] <= 25  # with its imports
    assert lengths["dart_often/choice.py"] <= 40


@pytest.mark.process
def test_the_pages_package_runs_by_the_pages_commands(package, saved_llama, tmp_path):
    lines = re.search(r"```console\n(.*?)```", PAGE.read_text(), re.S)[1].splitlines()
    said = []
    for line in lines:
        words = line.split()[1:]
        more = ["--model", saved_llama, "--output", "out"] if words[0] == "run" else []
        done = subprocess.run(
            [sys.executable, "-c", "from dart_eval.cli import main; main()", *words, *more], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    tree, ran = said
    assert "score=often" in tree
    assert "choice=now-and-then" in tree
    assert "share of the neurons that counts as largest (above 0, at most 1)" in tree
    assert ran.count("done smoke_questions") == 3
    assert "cats:choice=now-and-then 50 %" in ran


@pytest.mark.usefixtures("installed")
def test_their_code_is_in_the_key_and_their_fields_are_checked():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    config = RunConfig(method=("griffin", "griffin:score=often", "often"), tasks=("arc",))
    ours, score, both = (cell.inputs["method_code"] for cell in plan(config, model, ("arc",), {"arc": "h"}, "cpu"))
    assert ours is None
    assert len({score, both} - {None}) == 2
    with pytest.raises(UserError, match=r"griffin: score\.share is 2; it must be at most 1"):
        make("griffin", {"score": "often", "score.share": 2})


@pytest.mark.skipif(build.missing() is not None, reason=f"the page names kernels: {build.missing()}")
def test_the_page_of_methods_is_what_the_registry_knows():
    made = subprocess.run(
        [sys.executable, "-c", "import methods_page; print(methods_page.page(), end='')"], cwd=ROOT / "scripts",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made == (ROOT / "docs" / "methods.md").read_text(), "run scripts/methods_page.py"
