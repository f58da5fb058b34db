"""The hash of the code: what moves it, what does not, and whether it sees all that computes a number."""

import ast
import importlib
import shutil
import sys
from pathlib import Path

import pytest

from dart_eval.evaluation.tasks import tasks_dir
from dart_eval.pruning.registry import make
from dart_eval.sweep import hashes
from dart_eval.sweep.hashes import METHODS, NO_NUMBER, PACKAGE, method_files, numeric_files, shared_files, shared_hash
from dart_eval.sweep.options import config_from
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
    "the docstring of a module": ("What it is.", "What it was."),
    "the docstring of a class": ('"""How much a neuron matters."""', "'''How much\n\n    it matters.'''"),
    "the docstring of a function": ("The sum over tokens.", "A sum."),
    "a new docstring": ("async def name(self):\n", 'async def name(self):\n        "Of people."\n'),
    "how a number is written": ("0.5", ".5"),
    "a docstring in two pieces": ('"""The sum over tokens."""', '"The sum " "over tokens."'),
    "no docstring": ('        """The sum over tokens."""\n', ""),
    "a wider block": (f"{' ' * 12}h = h * 2\n{' ' * 12}h = h + 1", f"{' ' * 16}h = h * 2\n{' ' * 16}h = h + 1"),
    "a wrapped import": ("import FFN, find_ffns as found", "import (\n    FFN,\n    find_ffns as found,\n)"),
}
HARMFUL = {
    "a number": ("h * 2", "h * 3"),
    "what is imported": ("find_ffns as", "find_layers as"),
    "what an import is called": ("as found", "as seen"),
    "an operator": ("h > self.floor", "h >= self.floor"),
    "the format in an f-string": (":.2f", ":.3f"),
    "a text that is no docstring": ("    floor: float = 0.1\n", '    floor: float = 0.1\n    "Of a score."\n'),
    "a text after an import": ("import torch\n", 'import torch\n"No docstring."\n'),
    "a text in a block": ("            h = h * 2\n", '            "No docstring."\n            h = h * 2\n'),
    "what is no text": ('"""The sum over tokens."""', 'b"The sum over tokens."'),
    "what belongs to a block": ("            h = h + 1", "        h = h + 1"),
}


def changed(change):
    old, new = change
    assert CODE.count(old) == 1
    ast.parse(made := CODE.replace(old, new))
    return made


def test_what_code_says_moves_the_hash_and_how_it_is_written_down_does_not():
    for name, change in {**HARMLESS, **HARMFUL}.items():
        assert (source_hash(changed(change)) == source_hash(CODE)) == (name in HARMLESS), name
    # Texts that only look like docstrings.
    for code, old, new in (
        ("for i in x:\n    'a'\n    f(i)\n", "'a'", "'b'"), ("def f(x):\n    f'{x}'\n", "{x}", "{x()}"),
    ):  # fmt: skip
        assert source_hash(code) != source_hash(code.replace(old, new))
    # Half a call, and a method with its indentation, as `inspect.getsource` gives them.
    assert source_hash("    key=lambda x: (x,\n") != source_hash("    key=lambda x: (y,\n")
    method = "    def f(self):\n        '''A docstring.'''\n        return 1  # one\n"
    assert source_hash(method) == source_hash("    def f(self):\n        return 1\n")


# -- which files -------------------------------------------------------------------------------------------------------


PARSED = {}  # text -> what is read of a file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, whose files a test may change; one that has changed is read anew."""

    def read(file, stock=hashes._read.__wrapped__):
        if (text := file.read_bytes()) not in PARSED:
            PARSED[text] = stock(file)
        return PARSED[text]

    monkeypatch.setattr(hashes, "_read", read)
    folder = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "data", "results", "cli"))
    return folder


def digests(package, *names):
    """The two digests of each method's key, of the files in this folder as they are now."""
    shared_hash.cache_clear()
    shared = shared_hash(tasks_dir(), package)
    own = {name: {package / file.relative_to(PACKAGE) for file in method_files(make(name))} for name in names}
    return {name: (shared, hashes.digest(own[name])) for name in names}


NAMES = ("dense", "griffin", "cats", "teal", "dart")
CHANGED = {  # a file -> methods whose keys it moves
    "pruning/methods/cats.py": {"cats"}, "pruning/methods/both.py": set(), "pruning/methods/drift.py": {"dart"},
    "pruning/methods/griffin.py": {"griffin", "dart"}, "pruning/session.py": {*NAMES}, "pruning/rows.py": {*NAMES},
    "layers/ffn.py": {*NAMES}, "evaluation/lm.py": {*NAMES}, "sweep/worker.py": {*NAMES}, "sweep/plan.py": set(),
    "evaluation/task_names.py": set(), "pruning/registry.py": set(), "kernels/fast.py": set(),
}  # fmt: skip


@pytest.mark.slow  # all files are parsed
def test_a_file_moves_the_keys_of_those_whose_numbers_it_makes(package):
    before = digests(package, *NAMES)
    texts = {package / file: (package / file).read_text(encoding="utf-8") for file in CHANGED}
    for path, text in texts.items():
        path.write_text(f"{text}\n# A comment.\n", encoding="utf-8")
    assert digests(package, *NAMES) == before
    for path, text in texts.items():
        path.write_text(f"{text}\nNEW = 1\n", encoding="utf-8")
        after = digests(package, *NAMES)
        path.write_text(text, encoding="utf-8")
        assert {name for name in NAMES if after[name] != before[name]} == CHANGED[str(path.relative_to(package))], path


def test_a_new_methods_file_and_its_entry_move_no_other_key(package):
    before = digests(package, *NAMES)
    cats = (package / "pruning/methods/cats.py").read_text(encoding="utf-8")
    (package / "pruning/methods/lions.py").write_text(cats.replace("Cats", "Lions"), encoding="utf-8")
    registry = package / "pruning/registry.py"
    text, entry = registry.read_text(encoding="utf-8"), '    "lions": ("lions", "Lions"),\n    "cats"'
    registry.write_text(text.replace('    "cats"', entry), encoding="utf-8")
    assert digests(package, *NAMES) == before


def test_what_a_methods_file_imports_from_beside_it_is_its_own(package):
    files = {file.relative_to(PACKAGE).as_posix() for file in method_files(make("cats"))}
    assert "pruning/methods/cats.py" in files and all(file.startswith(METHODS) for file in files)
    assert "pruning/registry.py" not in {f.relative_to(PACKAGE).as_posix() for f in shared_files()}
    cats, beside = package / "pruning/methods/cats.py", package / "pruning/methods/beside.py"
    beside.write_text("NEW = 1\n", encoding="utf-8")
    with cats.open("a", encoding="utf-8") as file:
        file.write("from dart_eval.pruning.methods.beside import NEW\n")
    assert beside in hashes._with_imports({cats}, package) and beside not in shared_files(package)


def test_code_of_the_projects_tasks_is_shared(tmp_path, package):
    (tmp_path / "own.py").write_text("a = 1  # one")
    before = shared_hash(tmp_path, package)
    for text, same in (("a = 1  # two", True), ("a = 2", False)):
        (tmp_path / "own.py").write_text(text)
        shared_hash.cache_clear()
        assert (shared_hash(tmp_path, package) == before) == same


# -- does it see all ---------------------------------------------------------------------------------------------------

# What a worker or a task imports and no number comes of. A new module must be put here or into `NUMERIC_CODE`.
WITHOUT_NUMBERS = {
    *(f"kernels/cpu/{name}.py" for name in ("build", "columns", "ffns", "library", "packing")),  # are not run
    "kernels/fast.py", "kernels/mask_rows.py",  # are not run
    "evaluation/task_hash.py", "sweep/hashes.py", "util/source.py",  # hash
    "evaluation/task_names.py", "util/errors.py", "util/quiet.py", "util/retired.py", "util/text.py",  # names, words
    "models/demo_model.py", "models/spec.py",  # a model, whose files are hashed
    "pruning/registry.py", "sweep/options.py", "sweep/plan.py", "util/yamls.py",  # all that they decide is in a key
    "weights/checkpoint.py", "layers/finite.py",  # refuse models; the dtype that is read is in a key
    "results/inputs.py", "results/metrics.py", "sweep/events.py", "util/machine.py",  # describe
    "results/record.py", "results/store.py", "util/files.py",  # hold what they were given, or refuse
}  # fmt: skip


def imported(file):
    """The modules of the package that a file imports anywhere in it but for types, as files."""
    found, tree = set(), ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
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
    numeric = {f.relative_to(PACKAGE).as_posix() for f in numeric_files()}
    assert ours - numeric <= WITHOUT_NUMBERS >= {*NO_NUMBER}


@pytest.mark.slow
def test_what_cells_execute_is_known(saved_llama, tmp_path):
    """Of each kind of task: answers, a perplexity, a text."""
    config = config_from(None, {
        "model": saved_llama, "method": "dart,wanda-sp", "output": str(tmp_path), "limit": 1,
        "tasks": "smoke_questions,smoke_stories,smoke_summary", "gen_kwargs": "max_gen_toks=8",
    })  # fmt: skip
    importlib.import_module("dart_eval.sweep.worker")  # what an import executes does not count
    executed = set()
    sys.setprofile(lambda frame, event, _: executed.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        result = run_local(config, Watch())
    finally:
        sys.setprofile(None)
    assert len(result.records) == 6
    ours = {Path(f).relative_to(PACKAGE).as_posix() for f in executed if Path(f).is_relative_to(PACKAGE)}
    numeric = {f.relative_to(PACKAGE).as_posix() for f in numeric_files()}
    assert {"pruning/session.py", "evaluation/lm.py", "sweep/worker.py", "results/store.py"} <= ours
    assert ours - numeric <= {*WITHOUT_NUMBERS, "sweep/run.py"}  # which hands cells to the worker
