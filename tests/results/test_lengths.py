"""Files of the package can be read in one go, functions seen at one glance, and sentences of the docs understood."""

import ast
import re
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


# -- the docs ----------------------------------------------------------------------------------------------------------

ROOT, WORDS = PACKAGE.parent, 40  # words at most


def _sentences(page):
    """A page's prose, item by item: no code, no tables, no headings; names in backticks do not count as words."""
    text = re.sub(r"^```.*?^```|^(\||#|    ).*?$|`[^`]*`,?", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[*-]|\d+\.) ", text):
        yield from re.split(r"(?<=[.!?])[)*\"]*\s+", " ".join(paragraph.split()))


def test_no_sentence_of_the_docs_is_too_long():
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/**/*.md"))]
    found = [f"{page.name}: {said}" for page in pages for said in _sentences(page) if len(said.split()) > WORDS]
    assert len(pages) > 20 and not found, "\n".join(found)
