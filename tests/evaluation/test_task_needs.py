"""What tasks need beside lm-eval: named in one line, before anything is loaded."""

import re
from pathlib import Path

import lm_eval.tasks
import nltk
import pytest

from dart_eval.evaluation import task_names, task_needs
from dart_eval.util.errors import UserError

FOLDER = Path(lm_eval.tasks.__file__).parent
PACKAGES = {"math_verify": "math-verify", "antlr4": "antlr4-python3-runtime"}


@pytest.fixture
def installed(monkeypatch):
    """Everything is, and NLTK's data are."""
    monkeypatch.setattr(task_needs, "find_spec", lambda name: name)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)


@pytest.mark.slow  # reads the names of all tasks
@pytest.mark.parametrize(
    ("task", "module"), [("ifeval", "langdetect"), ("ruler_4k", "wonderwords"), ("longbench_lcc", "rouge")]
)
def test_a_missing_package_is_named_with_its_remedy(task, module, installed, monkeypatch):
    task_names.check_names([task])
    monkeypatch.setattr(task_needs, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(UserError) as refused:
        task_names.check_names([task])
    assert str(refused.value.problem) == f"task {task} needs the package {module}"
    assert refused.value.remedy == "pip install 'dart-eval[tasks]'"


def test_other_packages_go_by_their_own_name():
    assert task_needs.missing("mine", "else").remedy == "pip install else"


@pytest.mark.slow
def test_data_of_nltk_are_downloaded_or_named(installed, monkeypatch):
    def lacks(name):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", lacks)
    monkeypatch.setattr(nltk, "download", lambda name, **_: name == "punkt_tab")
    task_names.check_names(["ifeval"])
    monkeypatch.setattr(nltk, "download", lambda name, **_: False)
    task_names.check_names(["niah_single_1", "ruler_vt"])  # these cut no sentences
    for task in ("ifeval", "ruler_8k", "niah_single_2", "niah_multikey_1"):
        with pytest.raises(UserError, match=f"task {task} needs NLTK's data punkt_tab, which could not be downloaded"):
            task_names.check_names([task])


def test_the_extra_has_what_they_need():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    extra = re.search(r"^tasks = \[[^\n]*\n(.*?)^\]", text, re.S | re.M)[1]
    assert {PACKAGES.get(m, m) for m in task_needs.EXTRA} == set(re.findall(r'^ +"([a-z0-9-]+)', extra, re.M))


def test_their_code_imports_it():
    """Each module of the table is imported by a file of its folder, and the folder is one of lm-eval's."""
    for folder, modules in task_needs.MODULES.items():
        places = [p for p in FOLDER.glob(f"**/{folder}") if p.is_dir()]
        said = "\n".join(file.read_text() for place in places for file in place.glob("*.py"))
        for module in modules:
            imported = re.search(rf"^\s*(import|from) {module}\b", said, re.M)
            assert imported or f"{PACKAGES.get(module)}==" in said, (folder, module)  # sympy's parser imports antlr4
