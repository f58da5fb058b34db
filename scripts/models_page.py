"""Write docs/models.md: every type of language model, checked on a tiny one. A test says when a row is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.matrix.check import row  # noqa: E402
from tests.matrix.page import page  # noqa: E402
from tests.matrix.types import TYPES, VARIANTS  # noqa: E402

if __name__ == "__main__":
    rows = []
    for name in sorted([*TYPES, *VARIANTS]):
        rows.append(row(name))
        print(f"{name}: {rows[-1].refused or 'checked'}", flush=True)
    (ROOT / "docs" / "models.md").write_text(page(rows, transformers.__version__), encoding="utf-8")
