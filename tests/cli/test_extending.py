"""docs/extending.md holds a whole package; docs/methods.md and docs/options.md hold what the code says."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dart_eval import Method
from dart_eval.kernels.cpu import build
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.registry import make, methods, names, offered
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import plan
from dart_eval.util.errors import UserError
from tests.helpers.commands import program
from tests.helpers.models import tiny
from tests.helpers.sessions import generate, open_session, prompts_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"```\w+ file=(\S+)\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder into which the package of the page has been installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in BLOCK.findall(PAGE.read_text()):
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
    sys.modules.pop("dart_votes", None)


def test_a_method_is_one_file_of_25_lines():
    files = dict(BLOCK.findall(PAGE.read_text()))
    assert [*files] == ["dart_votes.py", "pyproject.toml"]
    assert len(files["dart_votes.py"].splitlines()) <= 25


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
    options, ran = said
    assert "power=2.0  exponent of a share; 2 is griffin's (above 0)" in options
    assert ran.count("done smoke_questions") == 3
    assert "votes:power=1.0 50 %" in ran


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_masks_are_griffins(family):
    model, prompts = tiny(family), prompts_of(3, 12)
    masks = {}
    for method in ("griffin", "votes", "votes:power=1"):
        name, _, power = method.partition(":power=")
        with open_session(model, name, 0.6, **({"power": power} if power else {})) as session:
            generate(model, prompts, 3)
            masks[method] = [session.masks(row) for row in range(3)]
            assert session.effective_sparsity == pytest.approx(0.6 * 2 / 3, abs=0.01)
    same = {m: all(torch.equal(a, b) for rows in zip(masks["griffin"], masks[m], strict=True)
                   for a, b in zip(*rows, strict=True)) for m in masks}  # fmt: skip
    assert same == {"griffin": True, "votes": True, "votes:power=1": False}


@pytest.mark.usefixtures("installed")
def test_its_code_is_in_the_key_and_its_options_are_checked():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    config = RunConfig(method=("griffin", "votes", "votes:power=1"), tasks=("arc",))
    griffin, votes, power = (cell.inputs for cell in plan(config, model, {"arc": "h"}, "cpu"))
    assert griffin["method_code"] != votes["method_code"] == power["method_code"]
    assert (votes["params"], power["params"]) == ({"method": "votes", "power": 2.0}, {"method": "votes", "power": 1.0})
    with pytest.raises(UserError, match=r"votes: power is '0'; it must be above 0"):
        make("votes", {"power": "0"})


def test_what_is_offered_and_is_no_method_is_left_out(monkeypatch, caplog):
    from importlib.metadata import EntryPoint

    from dart_eval.pruning import registry

    entries = {
        name: EntryPoint(name, value, "dart_eval.methods")
        for name, value in (("gone", "nowhere:X"), ("odd", "pathlib:Path"), ("griffin", "dart_eval:Method"))
    }
    monkeypatch.setattr(registry, "offered", lambda _: entries)
    assert {"gone", "odd"} <= {*names()} and not {"gone", "odd"} & {*methods()}
    assert methods()["griffin"].__name__ == "Griffin" and Method.name == "custom"
    assert "gone of another package cannot be imported" in caplog.text and "odd of another package is no" in caplog.text
    with pytest.raises(UserError, match="method 'odd' of another package cannot be used"):
        make("odd")


def test_a_field_without_a_word_of_help_is_an_option_too():
    class Plain(Method):
        width: int = 3

    assert Plain(width="4").spec == "custom:width=4"
    with pytest.raises(UserError, match="width is 'x'"):
        Plain(width="x")


@pytest.mark.parametrize("name", ["methods", "options"])
def test_a_page_is_what_the_code_says(name, monkeypatch):
    if name == "methods" and build.why_no_kernel() is not None:
        pytest.skip(f"the page names kernels: {build.why_no_kernel()}")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = importlib.import_module(f"{name}_page").page()
    assert made == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), f"run scripts/{name}_page.py"
