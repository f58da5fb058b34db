"""Count the words of the docs and results: README.md, docs/*.md, results/*.md, but no tables, code or generated pages.

    python scripts/count_words.py    # a line for each page, the sum, and the numbers in 100 words of the whole README

A number is a run of digits outside the target of a link, in tables and code, too.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"docs/methods.md", "docs/options.md", "docs/models.md", "docs/records.md", "results/paper-dart.md"}
TARGET = r"\]\([^)]*\)"  # of a link
NOT_PROSE = re.compile(rf"^```.*?^```|^(?:\||    ).*?$|<!--.*?-->|{TARGET}", re.S | re.M)


def words(page: Path) -> int:
    """Return the words of a page's prose and headings."""
    return sum(any(map(str.isalnum, word)) for word in NOT_PROSE.sub(" ", page.read_text(encoding="utf-8")).split())


def numbers_in_100_words(page: Path) -> float:
    """Return how dense a page is with numbers, tables and code included."""
    text = re.sub(TARGET, "]", page.read_text(encoding="utf-8"))
    return 100 * len(re.findall(r"\d[\d.,]*", text)) / len(text.split())


def main() -> None:
    """Print the counts."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]
    counts = {name: words(page) for page in pages if (name := str(page.relative_to(ROOT))) not in GENERATED}
    for name, count in [*counts.items(), ("in all", sum(counts.values()))]:
        print(f"{count:6,}  {name}")
    print(f"{numbers_in_100_words(pages[0]):6.1f}  numbers in 100 words of README.md")


if __name__ == "__main__":
    main()
