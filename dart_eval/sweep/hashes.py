"""The code's part of a cell's key: a digest of the shared code that makes numbers, and one of the method's own files.

A method's own files are that of its class, with what it imports from `METHODS`. What shared code imports from there is
shared, too. The registry counts only by what it makes of a method, which stands in the key.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dart_eval.util.source import tree_hash

if TYPE_CHECKING:
    from dart_eval.pruning.method import Method

PACKAGE = Path(__file__).parents[1]
NUMERIC = (
    "layers", "weights", "pruning", "evaluation", "kernels/top.py", "util/bits.py", "models/adapters.py",
    "models/loading.py", "results/sums.py", "sweep/worker.py",
)  # fmt: skip
METHODS = "pruning/methods"
# What refuses, names and hashes, and ways to decode faster: `run` multiplies by masks.
NO_NUMBER = (
    "pruning/registry.py", "layers/finite.py", "weights/checkpoint.py",
    "evaluation/task_hash.py", "evaluation/task_names.py",
)  # fmt: skip


@functools.cache  # a process runs the code that it has loaded, whatever becomes of the files
def shared_hash(tasks: Path, package: Path = PACKAGE) -> str:
    """Return a digest of the code of all cells. tasks: folder of the project's own; `task_hash` has their YAML."""
    return digest([*shared_files(package), *tasks.rglob("*.py")])


def shared_files(package: Path = PACKAGE) -> set[Path]:
    """Return the files of the code of all cells."""
    return _with_imports({f for f in numeric_files(package) if not f.is_relative_to(package / METHODS)}, package)


def numeric_files(package: Path = PACKAGE) -> set[Path]:
    """Return the files of all code that makes numbers, under any method."""
    without = {package / name for name in NO_NUMBER}
    return {f for name in NUMERIC for f in (package / name, *(package / name).rglob("*.py")) if f.is_file()} - without


def method_files(method: Method) -> set[Path]:
    """Return the files of a method's own code, which may be another package's; none of one typed at a prompt."""
    files = {str(getattr(inspect.getmodule(type(m)), "__file__", None)) for m in (method, method.inner)}
    return _with_imports({Path(file) for file in files if file.endswith(".py")}, PACKAGE)


def digest(files: Iterable[Path]) -> str:
    """Return a digest of the code in files, wherever they lie."""
    return hashlib.sha256("\n".join(sorted(_read(file)[0] for file in files)).encode()).hexdigest()


def _with_imports(files: set[Path], package: Path) -> set[Path]:
    """Return files with those of `METHODS` that they import, and that these import."""
    found, todo = {*files}, [*files]
    while todo:
        named = {package.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in _read(todo.pop())[1]}
        new = {f for f in named - found if f.is_relative_to(package / METHODS) and f.is_file()}
        found |= new
        todo += new
    return found


@functools.cache
def _read(file: Path) -> tuple[str, frozenset[str]]:
    """Return a digest of a file's code, and the modules that it imports anywhere."""
    tree = ast.parse(file.read_bytes())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {name for node in imports for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names))}
    return tree_hash(tree), frozenset(filter(None, names))
