"""Files of the package can be read in one go, and functions seen at one glance."""

import ast
from pathlib import Path

import dart_eval

PACKAGE = Path(dart_eval.__file__).parent
FILE, FUNCTION = 400, 60  # lines at most


def _too_long():
    for path in sorted(PACKAGE.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        if (lines := len(text.splitlines())) > FILE:
            yield f"{name}: {lines} lines"
        for node in ast.walk(ast.parse(text)):
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if function and (lines := node.end_lineno - node.lineno + 1) > FUNCTION:
                yield f"{name}, {node.name}: {lines} lines"


def test_no_file_and_no_function_is_too_long():
    """One that is does two things: it becomes two, with names that say what they do."""
    found = list(_too_long())
    assert not found, "\n".join(found)
