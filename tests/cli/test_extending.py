"""docs/extending.md holds a package, whose method works; docs/methods.md and options.md hold what the code says."""

import ast
import functools
import graphlib
import importlib
import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from transformers import LlamaConfig

from dart_eval import Method
from dart_eval.kernels.cpu import build
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning import registry
from dart_eval.pruning.registry import make, methods, names, offered
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import plan
from dart_eval.util.errors import UserError
from tests.helpers.commands import ROOT, command
from tests.helpers.models import tiny
from tests.helpers.sessions import generate, open_session, prompts_of

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder into which the package of the page has been installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE, re.S):
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


@pytest.mark.usefixtures("installed")
def test_the_pages_package_runs_by_the_pages_commands(saved_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in re.search(r"```console\n(.*?)```", PAGE, re.S)[1].splitlines():
        words = line.split()[1:]
        done = command(*words, *(["--model", saved_llama] if words[0] == "run" else []))
        assert done.code == 0 and "power" in done.out, done.err
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_masks_are_griffins(family):
    model, prompts = tiny(family), prompts_of(3, 12)
    masks = {}
    for method, options in (("griffin", {}), ("votes", {}), ("votes", {"power": "1"})):
        with open_session(model, method, 0.6, **options) as session:
            generate(model, prompts, 3)
            masks[method, len(options)] = torch.stack([torch.stack(session.masks(row)) for row in range(3)])
            assert session.effective_sparsity == pytest.approx(0.6 * 2 / 3, abs=0.01)
    same = {spec: torch.equal(masks["griffin", 0], found) for spec, found in masks.items()}
    assert same == {("griffin", 0): True, ("votes", 0): True, ("votes", 1): False}


@pytest.mark.usefixtures("installed")
def test_its_code_is_in_the_key_and_its_options_are_checked():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    config = RunConfig(method=("griffin", "votes", "votes:power=1"), tasks=("arc",))
    griffin, votes, power = (cell.inputs for cell in plan(config, model, {"arc": "h"}, "cpu"))
    assert griffin["method_code"] != votes["method_code"] == power["method_code"]
    assert (votes["params"], power["params"]) == ({"method": "votes", "power": 2.0}, {"method": "votes", "power": 1.0})
    with pytest.raises(UserError, match="power"):
        make("votes", {"power": "0"})


def test_what_is_offered_and_is_no_method_is_left_out(monkeypatch, caplog):
    entries = {
        name: EntryPoint(name, value, "dart_eval.methods")
        for name, value in (("gone", "nowhere:X"), ("odd", "pathlib:Path"), ("griffin", "dart_eval:Method"))
    }
    monkeypatch.setattr(registry, "offered", lambda _: entries)
    assert {"gone", "odd"} <= {*names()} and not {"gone", "odd"} & {*methods()}
    assert methods()["griffin"].__name__ == "Griffin" and Method.name == "custom"
    assert "gone" in caplog.text and "odd" in caplog.text
    with pytest.raises(UserError, match="odd"):
        make("odd")


def test_a_field_without_a_word_of_help_is_an_option_too():
    class Plain(Method):
        width: int = 3

    assert Plain(width="4").spec == "custom:width=4"
    with pytest.raises(UserError, match="width"):
        Plain(width="x")


@pytest.mark.parametrize("name", ["methods", "options"])
def test_a_page_is_what_the_code_says(name, monkeypatch):
    if name == "methods" and build.why_no_kernel() is not None:
        pytest.skip(f"the page names kernels: {build.why_no_kernel()}")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = importlib.import_module(f"{name}_page").page()
    assert made == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), f"run scripts/{name}_page.py"


# -- the house as docs/architecture.md has it: folders in their order, imports down, no circles ------------------------

PACKAGE = ROOT / "dart_eval"
HOUSE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = re.findall(r"^\| `([\w./]+)` \|", HOUSE.split("## What lives where")[1].split("\n## ")[0], re.MULTILINE)
LOOSE = {"__init__.py", "__main__.py", "api.py"}


def name_of(file):
    return file.relative_to(PACKAGE).as_posix()


def module(*parts):
    """The file of a dotted name; None where it is none."""
    path = PACKAGE.joinpath(*parts)
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if parts and f.is_file()), None)


def running(node):
    """The nodes of code that runs: a method and its session name each other as types."""
    if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from running(child)


def imports(file):
    """Files of the package that a file imports anywhere in it, but for types alone."""
    for node in running(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parts = node.module.split(".")[1:]
            yield from {module(*parts, a.name) or module(*parts) for a in node.names} - {None, file}


@functools.cache
def graph():
    return {name_of(f): {name_of(g) for g in imports(f)} for f in sorted(PACKAGE.rglob("*.py"))}


def test_imports_go_down_and_in_no_circle():
    order = list(dict.fromkeys(f.split("/")[0] for f in FOLDERS))
    up = [
        (file, other)
        for file, others in graph().items()
        for other in others
        if file not in LOOSE and order.index(file.split("/")[0]) > order.index(other.split("/")[0])
    ]
    assert not up
    graphlib.TopologicalSorter(graph()).prepare()  # raises a CycleError that names the files
