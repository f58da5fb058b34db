"""The report of `mutate.py`, in Markdown: counts, survivors, one line for each mutant."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.mutation.operators import Mutant


@dataclass(frozen=True)
class Result:
    """Which test noticed a mutant (none: it survives), after how many seconds; what was said, if there is no mutant."""

    by: str
    seconds: float
    log: str = ""


Found = Sequence[tuple["Mutant", Result]]


def report(found: Found) -> str:
    """The page."""
    noticed = sum(bool(result.by) for _, result in found)
    lines = [
        "# Mutants of the numeric core",
        "",
        f"Made by `make mutations`. The fast lane of the tests notices {noticed} of {len(found)} mutants; "
        f"of the others {sum(bool(m.survives) for m, r in found if not r.by)} change no number.",
        "`tests/mutation/operators.py` makes them. Seconds are a processor's, without the imports that all share.",
        "",
        "## Survivors",
        "",
    ]
    survivors = [(m, r) for m, r in found if not r.by]
    why = [m.survives.capitalize() or "**No test notices it**" for m, _ in survivors]
    lines += [f"* `{m.file}`: `{m.what}`. {w}." for (m, _), w in zip(survivors, why, strict=True)] or ["None."]
    lines += ["", "## By kind and by part", ""]
    lines += [*_counts("kind", found, lambda m: m.kind), "", *_counts("module", found, lambda m: m.file), ""]
    lines += ["## One by one", ""]
    for file, part in itertools.groupby(found, key=lambda pair: pair[0].file):
        lines += [f"### {file}", "", "| what is broken | kind | noticed by | s |", "| --- | --- | --- | --- |"]
        for mutant, result in part:
            by = f"`{_cell(result.by)}`" if result.by else "**survives**"
            lines.append(f"| {_cell(mutant.what)} | {mutant.kind} | {by} | {result.seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _counts(title: str, found: Found, of: object) -> Iterator[str]:
    every = Counter(of(m) for m, _ in found)  # type: ignore[operator]
    noticed = Counter(of(m) for m, r in found if r.by)  # type: ignore[operator]
    yield from (f"| {title} | mutants | noticed |", "| --- | --- | --- |")
    for name, count in sorted(every.items()):
        yield f"| {name} | {count} | {noticed[name]} |"


def noticed_by(text: str) -> dict[str, str]:
    """What is broken -> the test that noticed it, as an earlier report says."""
    rows = re.findall(r"^\| (.+) \| [a-z ]+ \| `(tests/.+)` \| \d+ \|$", text, re.M)
    return {what.replace("\\|", "|"): by.replace("\\|", "|") for what, by in rows}
