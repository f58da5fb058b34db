"""What was tried and what happened: a line for each unit of work, the summary, the table and the page made of them."""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 5  # falls of a row that the page shows


@dataclass
class Result:
    """What came of a unit. told: how many ended in which way. fell: what must not be, with how to see it again."""

    tried: int = 0
    told: dict[str, int] = field(default_factory=dict)
    fell: list[str] = field(default_factory=list)

    def count(self, word: str, times: int = 1) -> None:
        """Add to one of the ways."""
        self.told[word] = self.told.get(word, 0) + times


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done whole or again. row: the row of the table that it counts for."""

    name: str
    row: str
    work: Callable[[], Result]


def drawn(seed: int, name: str) -> random.Random:
    """The random numbers of a unit, or of a case."""
    return random.Random(f"{seed} {name}")


class Ledger:
    """The results so far, in `folder`/state.jsonl.

    Raises:
        ValueError: those that are there have another seed or length, or are of other code.
    """

    def __init__(self, folder: Path, seed: int, short: bool) -> None:
        self.folder, self.file, self.known = folder, folder / "state.jsonl", dict[str, dict[str, Any]]()
        self.about = {"seed": seed, "short": short, "code": _code()}
        folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self._write(self.about)
        lines = self.file.read_text(encoding="utf-8").split("\n")
        if json.loads(lines[0]) != self.about:
            raise ValueError(f"{folder} is of another seed, length or code; remove it, or take another --output")
        for line in lines[1:-1]:  # the last one is empty, or was cut short
            result = json.loads(line)
            self.known[result.pop("name")] = result
        self.file.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")

    def add(self, unit: Unit, result: Result, seconds: float) -> None:
        """Keep what came of a unit."""
        self.known[unit.name] = {"row": unit.row, "seconds": round(seconds, 1), **asdict(result)}
        self._write({"name": unit.name, **self.known[unit.name]})

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        """The rows, each of all its units; also written to `folder`/summary.json."""
        rows: dict[str, dict[str, Any]] = {}
        for result in self.known.values():
            row = rows.setdefault(result["row"], {"tried": 0, "seconds": 0.0, "told": {}, "fell": []})
            row["tried"] += result["tried"]
            row["seconds"] = round(row["seconds"] + result["seconds"], 1)
            row["fell"] += result["fell"]
            for word, count in result["told"].items():
                was = row["told"].get(word, 0)
                row["told"][word] = max(was, count) if word.endswith(MOST) else was + count
        packages = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
        found = {
            **self.about, "python": platform.python_version(), "packages": packages,
            "rows": [{"row": name, **row} for name, row in rows.items()],
        }  # fmt: skip
        (self.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


MOST = "at most"  # ends words of which the largest counts, not the sum


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    lines = [f"{'':<24}{'tried':>7}{'fell':>6}{'min':>7}  how it went"]
    for row in summary["rows"]:
        lines.append(f"{row['row']:<24}{row['tried']:>7}{len(row['fell']):>6}{row['seconds'] / 60:>7.1f}  {_went(row)}")
    fell = sum(len(row["fell"]) for row in summary["rows"])
    return "\n".join([*lines, f"seed {summary['seed']}: {fell or 'nothing'} fell"])


def page(summary: dict[str, Any]) -> str:
    """The summary in results/robustness.md, of which the beginning and the end stay."""
    rows, packages = summary["rows"], ", ".join(f"{name} {v}" for name, v in summary["packages"].items())
    minutes = sum(row["seconds"] for row in rows) / 60
    about = f"Seed {summary['seed']}, Python {summary['python']}, {packages}, on a CPU, {minutes:.0f} minutes."
    lines = ["| what | tried | fell | how it went |", "|---|---|---|---|"]
    lines += [f"| {row['row']} | {row['tried']:,} | {len(row['fell'])} | {_went(row)} |" for row in rows]
    fell = [f"* {row['row']}: `{' '.join(line.split())[:160]}`" for row in rows for line in row["fell"][:SHOWN]]
    lines += ["", "## What fell", "", *(fell or ["Nothing."])]
    begin, _, rest = (ROOT / "results" / "robustness.md").read_text(encoding="utf-8").partition("\nSeed ")
    _, end, after = rest.partition("\n## What counts as a fall")
    return "\n".join([begin, about, "", *lines, end + after])


def _went(row: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {word}" for word, count in sorted(row["told"].items(), key=lambda pair: -pair[1]))


def _code() -> str:
    """Tells this package and this program from others."""
    digest = hashlib.sha256()
    for file in sorted(f for part in ("dart_eval", "tasks", "scripts/torture") for f in (ROOT / part).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
