"""A digest of Python source that changes with what code says, not with comments, docstrings or layout."""

from __future__ import annotations

import ast
import hashlib
import textwrap

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_hash(source: str) -> str:
    """Return the sha256 of the syntax tree of Python source, or of text that is no whole statement (half a call).

    Args:
        source: of a module or a part of one, such as a method with its indentation.
    """
    try:
        return tree_hash(ast.parse(textwrap.dedent(source)))
    except SyntaxError:
        return hashlib.sha256(source.encode()).hexdigest()


def tree_hash(tree: ast.AST) -> str:
    """Return the sha256 of a syntax tree without its docstrings."""
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()


def _plain(node: object) -> object:
    """Return a tree as lists. What is empty is left out: a later version of Python may have more fields."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    found: list[object] = [type(node).__name__]
    for name in node._fields:
        value = getattr(node, name, None)
        if name == "body" and isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            value = node.body[1:]
        if value is not None and value != []:
            found += [name, _plain(value)]
    return found
