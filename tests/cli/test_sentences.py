"""Sentences of the docs can be understood at one reading."""

import re
from pathlib import Path

ROOT, WORDS = Path(__file__).resolve().parents[2], 40  # words at most


def _sentences(page):
    """A page's prose, item by item: no code, no tables, no headings; names in backticks do not count as words."""
    text = re.sub(r"^```.*?^```|^(\||#|    ).*?$|`[^`]*`,?", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[*-]|\d+\.) ", text):
        yield from re.split(r"(?<=[.!?])[)*\"]*\s+", " ".join(paragraph.split()))


def test_no_sentence_of_the_docs_is_too_long():
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/**/*.md"))]
    found = [f"{page.name}: {said}" for page in pages for said in _sentences(page) if len(said.split()) > WORDS]
    assert len(pages) > 20 and not found, "\n".join(found)
