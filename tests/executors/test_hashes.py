"""The hash of the code: what moves it, what does not, and whether it sees all that computes a number."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest

from dart_eval.evaluation.tasks import tasks_dir
from dart_eval.sweep import hashes
from dart_eval.sweep.config import config_from
from dart_eval.sweep.hashes import NO_NUMBER, NOT_RUN, PACKAGE, code_hash, contents, hash_of, numeric_files
from dart_eval.util.source import source_hash
from tests.helpers.commands import Watch, run_local

CODE = '''\
"""What it is."""

import torch

from dart_eval.layers.ffn import FFN, find_ffns as found

SCALE = 0.5  # of everything


class Score:
    """How much a neuron matters."""

    floor: float = 0.1

    def energy(self, h, weight):
        """The sum over tokens."""
        if weight is None:
            h = h * 2
            h = h + 1
        return torch.where(h > self.floor, h, SCALE)

    async def name(self):
        return f"energy {self.floor:.2f}"
'''

HARMLESS = {
    "a comment": ("# of everything", "# of nothing"),
    "a new comment": ("import torch\n", "# torch is a library.\nimport torch\n"),
    "the docstring of a module": ("What it is.", "What it was."),
    "the docstring of a class": ('"""How much a neuron matters."""', "'''How much\n\n    it matters.'''"),
    "the docstring of a function": ("The sum over tokens.", "A sum."),
    "a new docstring": ("async def name(self):\n", 'async def name(self):\n        "Of people."\n'),
    "a docstring in two pieces": ('"""The sum over tokens."""', '"The sum " "over tokens."'),
    "no docstring": ('        """The sum over tokens."""\n', ""),
    "a wrapped line": ("torch.where(h > self.floor, h, SCALE)", "torch.where(\n    h > self.floor,\n    h, SCALE\n)"),
    "a line wrapped by a backslash": ("h = h * 2", "h = \\\n  h * 2"),
    "blanks": ("h = h * 2", "h  =  h*2"),
    "a wider block": (f"{' ' * 12}h = h * 2\n{' ' * 12}h = h + 1", f"{' ' * 16}h = h * 2\n{' ' * 16}h = h + 1"),
    "where a file lies": ("dart_eval.layers.ffn import", "dart_eval.layers.ffn import"),
    "the order of imports": ("FFN, find_ffns as found", "find_ffns as found, FFN"),
    "a wrapped import": ("import FFN, find_ffns as found", "import (\n    FFN,\n    find_ffns as found,\n)"),
    "imports in two lines": ("import FFN, ", "import FFN\nfrom dart_eval.layers.verify import "),
    "empty lines": ("class Score:", "\n\n\nclass Score:"),
}
HARMFUL = {
    "a number": ("h * 2", "h * 3"),
    "how a number is written": ("0.5", ".5"),
    "what is imported": ("find_ffns as", "find_layers as"),
    "what an import is called": ("as found", "as seen"),
    "a library": ("import torch\n", "import numpy as torch\n"),
    "an operator": ("h > self.floor", "h >= self.floor"),
    "a name": ("h, SCALE", "weight, SCALE"),
    "a default": ("= 0.1", "= 0.2"),
    "an f-string": ("energy {", "score {"),
    "the format in an f-string": (":.2f", ":.3f"),
    "a text that is no docstring": ("    floor: float = 0.1\n", '    floor: float = 0.1\n    "Of a score."\n'),
    "a text after an import": ("import torch\n", 'import torch\n"No docstring."\n'),
    "a text in a block": ("            h = h * 2\n", '            "No docstring."\n            h = h * 2\n'),
    "what is no text": ('"""The sum over tokens."""', 'b"The sum over tokens."'),
    "what belongs to a block": ("            h = h + 1", "        h = h + 1"),
    "a comma": ("SCALE)", "SCALE,)"),
}


def changed(change):
    old, new = change
    assert CODE.count(old) == 1
    ast.parse(made := CODE.replace(old, new))
    return made


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_how_code_is_written_down_does_not_move_the_hash(change):
    assert source_hash(changed(change)) == source_hash(CODE)


@pytest.mark.parametrize("change", HARMFUL.values(), ids=HARMFUL)
def test_what_code_says_moves_the_hash(change):
    assert source_hash(changed(change)) != source_hash(CODE)


def test_a_text_that_only_looks_like_a_docstring_counts():
    loop = "for i in x:\n    'a'\n    f(i)\n"
    assert source_hash(loop) != source_hash(loop.replace("'a'", "'b'"))
    formatted = "def f(x):\n    f'{x}'\n"
    assert source_hash(formatted) != source_hash(formatted.replace("{x}", "{x()}"))


def test_half_a_call_and_a_method_with_its_indentation_have_a_hash():
    """As `inspect.getsource` gives them."""
    assert source_hash("    key=lambda x: (x,\n") != source_hash("    key=lambda x: (y,\n")
    method = "    def f(self):\n        '''A docstring.'''\n        return 1  # one\n"
    assert source_hash(method) == source_hash("    def f(self):\n        return 1\n")


# -- which files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A package and its tasks."""
    package, tasks = tmp_path / "package", tmp_path / "tasks"
    texts = {
        "weights/codes.py": "a = 1", "sweep/plan.py": "a = 1", "pruning/session/session.py": "a = 1",
        "pruning/session/execution.py": "a = 1", "evaluation/task_names.py": "a = 1",
        "pruning/methods/mine.py": "a = 1", "pruning/session/kernels.py": "a = 1", "kernels/mask_rows.py": "a = 1",
        "evaluation/lm.py": "a = 1", "sweep/worker.py": "a = 1", "sweep/local.py": "a = 1",
    }  # fmt: skip
    for name, text in texts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (tasks / "own").mkdir(parents=True)
    (tasks / "own" / "own.yaml").write_text("task: own  # a task\n")
    (tasks / "own" / "own.py").write_text("a = 1  # one")
    return package, tasks


@pytest.mark.parametrize(("name", "moves"), [
    ("weights/codes.py", True), ("pruning/session/session.py", True), ("pruning/session/execution.py", True),
    ("evaluation/lm.py", True), ("evaluation/task_names.py", False),
    ("pruning/methods/mine.py", True), ("sweep/worker.py", True), ("sweep/plan.py", False),
    ("sweep/local.py", False), ("pruning/session/kernels.py", False), ("kernels/mask_rows.py", False),
])  # fmt: skip
def test_only_a_change_of_numeric_code_that_is_run_moves_the_hash(folders, name, moves):
    before = hash_of(contents(*folders))
    (folders[0] / name).write_text("a = 1  # one")
    assert hash_of(contents(*folders)) == before
    (folders[0] / name).write_text("a = 2")
    assert (hash_of(contents(*folders)) != before) == moves


def test_a_new_file_moves_the_hash_and_a_moved_one_does_not(folders):
    package, tasks = folders
    method = package / "pruning" / "methods" / "mine.py"
    before = hash_of(contents(package, tasks))
    method.rename(package / "evaluation" / "yours.py")
    (package / "weights" / "codes.py").rename(package / "pruning" / "methods" / "codes.py")
    (tasks / "own" / "own.yaml").rename(tasks / "other.yaml")
    assert hash_of(contents(package, tasks)) == before
    method.write_text("a = 1")
    assert hash_of(contents(package, tasks)) != before


def test_code_of_tasks_counts_by_its_tokens_and_their_yaml_as_it_is(folders):
    own = folders[1] / "own"
    before = hash_of(contents(*folders))
    (own / "own.py").write_text("a = 1  # two")
    assert hash_of(contents(*folders)) == before
    (own / "own.py").write_text("a = 2")
    changed = hash_of(contents(*folders))
    assert changed != before
    (own / "own.yaml").write_text("task: own\n")
    assert hash_of(contents(*folders)) != changed


def test_the_hash_in_the_cache_stands_for_these_bytes_alone(folders, tmp_path, monkeypatch):
    """A file that changes within its size and its times is seen; a damaged cache, or none, costs time alone."""

    def asked():
        code_hash.cache_clear()  # as in another process
        return code_hash(folders[1])

    made = []
    monkeypatch.setattr(hashes, "PACKAGE", folders[0])
    monkeypatch.setattr(hashes, "hash_of", lambda files: made.append(0) or hash_of(files))
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    assert asked() == asked() == hash_of(contents(*folders)) and len(made) == 1
    file = folders[0] / "weights" / "codes.py"
    times = file.stat()
    file.write_text("a = 2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert asked() == asked() == hash_of(contents(*folders)) and len(made) == 2
    for text in ("", "half", f"{'0' * 64} {'0' * 64}", "\xe4\xf6"):
        (tmp_path / "cache" / "code-hash").write_text(text, encoding="utf-8")
        assert asked() == hash_of(contents(*folders))
    monkeypatch.setenv("DART_EVAL_CACHE", str(file))  # no folder
    assert asked() == hash_of(contents(*folders)) and len(made) == 7
    code_hash.cache_clear()


# -- does it see all ---------------------------------------------------------------------------------------------------

# What a worker or a task imports and no number comes of. A new module must be put here or into `NUMERIC_CODE`.
WITHOUT_NUMBERS = {
    "evaluation/task_hash.py": "hashes",
    "evaluation/task_names.py": "names",
    "evaluation/task_needs.py": "refuses",
    "kernels/cpu/blocks.py": "is not run",
    "kernels/cpu/build.py": "is not run",
    "kernels/cpu/columns.py": "is not run",
    "kernels/cpu/ffns.py": "is not run",
    "kernels/cpu/library.py": "is not run",
    "kernels/cpu/packing.py": "is not run",
    "kernels/cpu/rows.py": "is not run",
    "kernels/forward.py": "is not run",
    "kernels/mask_rows.py": "is not run",
    "layers/finite.py": "refuses",
    "models/demo_model.py": "makes a model, whose files are hashed",
    "models/explained.py": "says what a user is told",
    "models/device.py": "names a device, which is part of a key",
    "models/digest.py": "hashes a model's files",
    "models/hub.py": "asks whether the hub is there, and for commits",
    "pruning/session/kernels.py": "is not run",
    "results/format.py": "messages",
    "results/inputs.py": "describes what it was given",
    "results/journal.py": "hands back what it was given",
    "results/layout.py": "refuses",
    "results/metrics.py": "describes metrics",
    "results/progress.py": "says how far a run is",
    "results/record.py": "holds what it was given",
    "results/store.py": "keeps records",
    "sweep/config.py": "reads options, which are part of a key",
    "sweep/feasible.py": "says what is to be run",
    "sweep/hashes.py": "hashes",
    "sweep/jobs.py": "says what is to be run",
    "sweep/habits.py": "reads options, which are part of a key",
    "sweep/options.py": "options, which are part of a key",
    "sweep/plan.py": "makes keys: all that it decides is in them",
    "sweep/values.py": "reads options, which are part of a key",
    "util/errors.py": "messages",
    "util/files.py": "reads and writes files as they are",
    "util/machine.py": "describes the machine",
    "util/quiet.py": "keeps libraries from talking",
    "util/source.py": "hashes",
    "util/text.py": "messages",
    "util/yamls.py": "reads options, which are part of a key",
    "weights/checkpoint.py": "refuses models; the dtype that it reads is part of a key",
}


def imported(file):
    """The modules of the package that a file imports anywhere in it, as files."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            named = PACKAGE.joinpath(*node.module.split(".")[1:])
            found |= {named.with_suffix(".py"), *(named / f"{alias.name}.py" for alias in node.names)}
    return {f for f in found if f.is_file()}


def reached(files):
    """These files and all that they import, and what that imports."""
    found, todo = set(), list(files)
    while todo:
        if (file := todo.pop()) not in found:
            found.add(file)
            todo += imported(file)
    return found


def test_what_a_worker_imports_counts_or_computes_no_number():
    files = reached([PACKAGE / "sweep" / "worker.py", *tasks_dir().rglob("*.py")])
    ours = {f.relative_to(PACKAGE).as_posix() for f in files if f.is_relative_to(PACKAGE)}
    numeric = {f.relative_to(PACKAGE).as_posix() for f in numeric_files(PACKAGE)}
    assert ours - numeric == {*WITHOUT_NUMBERS}
    assert {*NOT_RUN, *NO_NUMBER} <= {*WITHOUT_NUMBERS}


@pytest.mark.slow
def test_what_cells_execute_is_known(saved_llama, tmp_path):
    """Of each kind of task: answers, a perplexity, a text."""
    config = config_from(None, {
        "model": saved_llama, "method": "dense,dart-choice,wanda-sp", "output": str(tmp_path), "limit": 1,
        "tasks": "smoke_questions,smoke_stories,smoke_summary",
    })  # fmt: skip
    importlib.import_module("dart_eval.sweep.worker")  # what an import executes does not count
    executed = set()
    sys.setprofile(lambda frame, event, _: executed.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        result = run_local(config, Watch())
    finally:
        sys.setprofile(None)
    assert len(result.records) == 9
    ours = {Path(f).relative_to(PACKAGE).as_posix() for f in executed if Path(f).is_relative_to(PACKAGE)}
    numeric = {f.relative_to(PACKAGE).as_posix() for f in numeric_files(PACKAGE)}
    assert {"pruning/session/state.py", "evaluation/lm.py", "sweep/worker.py", "results/journal.py"} <= ours
    assert not ours & {*NOT_RUN}
    assert ours - numeric <= {*WITHOUT_NUMBERS, "sweep/local.py"}  # which hands cells to the worker
