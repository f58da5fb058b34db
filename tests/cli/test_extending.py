"""docs/extending.md holds a whole package; docs/methods.md and docs/options.md hold what the code says."""

import importlib
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
from tests.helpers.commands import program

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


def test_a_score_is_20_lines_and_a_choice_20():
    lengths = {name: len(text.strip().splitlines()) for name, text in BLOCK.findall(PAGE.read_text())}
    assert lengths["dart_often/score.py"] <= 25  # with its imports
    assert lengths["dart_often/choice.py"] <= 25


@pytest.mark.process
def test_the_pages_package_runs_by_the_pages_commands(package, saved_llama, tmp_path):
    lines = re.search(r"```console\n(.*?)```", PAGE.read_text(), re.S)[1].splitlines()
    said = []
    (tmp_path / "begin.py").write_text(
        f"import sys\nsys.path.insert(0, {str(package)!r})\nfrom dart_eval import cli\n"
        "from dart_eval.pruning.registry import offered\noffered.cache_clear()\ncli.main()\n"
    )
    for line in lines:
        words = line.split()[1:]
        more = ["--model", saved_llama, "--output", "out"] if words[0] == "run" else []
        done = program(*words, *more, cwd=tmp_path, script=tmp_path / "begin.py")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    tree, ran = said
    assert "score=often" in tree
    assert "share of the neurons that counts as largest (above 0, at most 1)" in tree
    assert ran.count("done smoke_questions") == 3
    assert "cats:choice=positive 50 %" in ran


@pytest.mark.usefixtures("installed")
def test_their_code_is_in_the_key_and_their_fields_are_checked():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    config = RunConfig(method=("griffin", "griffin:score=often", "often"), tasks=("arc",))
    ours, score, both = (cell.inputs["method_code"] for cell in plan(config, model, ("arc",), {"arc": "h"}, "cpu"))
    assert len({ours, score, both}) == 3
    with pytest.raises(UserError, match=r"griffin: score\.share is 2; it must be at most 1"):
        make("griffin", {"score": "often", "score.share": 2})


@pytest.mark.parametrize("name", ["methods", "options"])
def test_a_page_is_what_the_code_says(name, monkeypatch):
    if name == "methods" and build.why_no_kernel() is not None:
        pytest.skip(f"the page names kernels: {build.why_no_kernel()}")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = importlib.import_module(f"{name}_page").page()
    assert made == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), f"run scripts/{name}_page.py"
