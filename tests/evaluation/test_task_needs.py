"""What tasks need beside lm-eval: named in one line, before any model is loaded."""

import sys
from pathlib import Path

import lm_eval.tasks
import nltk
import pytest

from dart_eval.evaluation.tasks import Tasks
from dart_eval.util.errors import UserError

FOLDER = Path(lm_eval.tasks.__file__).parent


@pytest.fixture
def _unloaded(monkeypatch):
    """Code of tasks is imported anew."""
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.") and "._" not in name]:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_unloaded")
@pytest.mark.parametrize(
    ("task", "module"),
    [("ifeval", "langdetect"), ("ruler_4k", "wonderwords"), ("longbench_lcc", "rouge"), ("minerva_math", "sympy")],
)
def test_a_missing_package_is_named_with_its_remedy(task, module, monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # or its data would be fetched
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as refused:
        Tasks(tmp_path, tokenizer=lambda: None).load(task)
    assert str(refused.value.problem) == f"task {task} needs the package {module}"
    assert refused.value.remedy.startswith("pip install 'dart-eval[tasks]'")


def test_other_packages_go_by_their_own_name(tmp_path):
    (tmp_path / "code.py").write_text("import no_such_package")
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function code.text\n")
