"""The house as docs/architecture.md has it: its folders in their order, imports that go down, and no circles."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import dart_eval

PACKAGE = Path(dart_eval.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = re.findall(r"^\| `([\w./]+)` \|", PAGE.split("## What lives where")[1].split("\n## ")[0], re.MULTILINE)
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


def test_every_folder_stands_in_the_list_and_nothing_lies_loose():
    folders = {name_of(f.parent) for f in PACKAGE.rglob("__init__.py")} - {".", "results/report"}
    assert {f.rstrip("/") for f in FOLDERS} - {"api.py"} == folders
    assert {f.name for f in PACKAGE.glob("*.py")} == LOOSE


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
