"""For mkdocs: the pages of the site stand where they stand in the repository, so that their links hold.

Beside results/board.md stands its table alone, as `results/rows.md`; `tables.js` makes tables sort.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs/*", "results/**/*", "notebooks/*.ipynb",
    "tests/derivations/test_*.py", "action.yml", "Dockerfile",
)  # fmt: skip
ASSETS = "scripts/site/tables.js", "scripts/site/extra.css"
BOARD = """---
hide: [toc]
---
# Board

A click on the head of a column sorts by it. The [whole page](board.md) has sentences, tests and commands,
and [results](README.md) has every other table.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what mkdocs found in `docs_dir` by the files of the site."""
    for file in [f for f in files if f.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(p for pattern in SHOWN for p in ROOT.glob(pattern) if p.is_file()):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for asset in ASSETS:
        files.append(File.generated(config, Path(asset).name, abs_src_path=str(ROOT / asset)))
    files.append(File.generated(config, "results/rows.md", content=BOARD + rows_of(ROOT / "results" / "board.md")))
    return files


def rows_of(page: Path) -> str:
    """Return the section of a page that holds all rows."""
    found = re.search(r"^## All rows$.*?(?=^## |\Z)", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert found, f"{page} has no board"
    return f"\n{found[0]}"
