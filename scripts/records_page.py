"""Writes the tables of docs/records.md from the types of `dart_eval.results`: `record` and `inputs`.

python scripts/records_page.py
"""

from __future__ import annotations

from pathlib import Path

from dart_eval.results import inputs, record
from dart_eval.results.record import SCHEMA, Metric, Record, Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "records.md"
BEGIN, END = "<!-- made by scripts/records_page.py: begin -->", "<!-- end -->"
OWN = {
    "schema": f"version of this layout, {SCHEMA}. Records of any other version are named and left out",
    "digest": "sha256 over the rest: a record that was edited is refused",
}


def table(found: dict[str, str]) -> list[str]:
    """Markdown."""
    return ["| key | meaning |", "| --- | --- |", *(f"| `{name}` | {text} |" for name, text in found.items()), ""]


def text() -> str:
    """The part of the page between the two marks."""
    roles = {
        inputs.ASKED: "part of the question that the cell answers",
        inputs.HOW: "how it was computed, which may move digits",
        inputs.PROVENANCE: "which code and versions produced the numbers",
    }
    fields = {name: f"{field.help} ({field.role})" for name, field in inputs.FIELDS.items()}
    said = "; ".join(f"*{role}*: {words}" for role, words in roles.items())
    lines = [
        BEGIN, "", "## A record", "", *table(OWN | inputs.notes(Record, str)),
        "### Its inputs", "", f"Each has a role. {said[0].upper()}{said[1:]}.", "", *table(fields),
        "### One of its metrics", "", *table(inputs.notes(Metric, str)),
        "### Its settings", "", "They cannot change a number. `batch_size` stands here too.", "",
        *table(inputs.notes(Settings, str)),
        "## A sample", "", *table(inputs.notes(record.Sample, str)),
        "### What a drift detector saw", "", *table(inputs.notes(record.Drift, str)),
        "## A line of `texts`", "", *table(inputs.notes(record.Document, str)), END,
    ]  # fmt: skip
    return "\n".join(lines)


def page(old: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{text()}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
