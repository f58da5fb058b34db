"""The head of the page: the run, and cautions to read before the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_eval.results import metrics
from dart_eval.results.blocks import Block, BoardRow, Level
from dart_eval.results.board_text import columns_of, name_of, read_of
from dart_eval.results.format import finite, sparsity
from dart_eval.results.inputs import HASH_DIGITS, matters, model_of
from dart_eval.results.record import Record
from dart_eval.results.report.cells import ReportCell
from dart_eval.results.tables import cut_prompts
from dart_eval.results.verdict import BEST

FEW = 100  # documents below which an interval is wide enough to say so
ALIKE = ("code", "dtype", "device", "scope", "limit", "num_fewshot")  # inputs that a reader expects to be equal
HALF = ("float16", "bfloat16", "fp16", "bf16")
FIRST = ("above", "of dense", "perplexity")  # columns of the board that say what is left of dense
COSTS = {"memory": "{} beside", "work": "{} work", "speed": "{} as fast"}  # columns that say what it costs
PACKAGES = ("dart-eval", "python", "torch", "transformers", "lm_eval")


def answer(block: Block) -> tuple[str, list[str], list[tuple[BoardRow, str, list[str]]]]:
    """Return which row to take at each level: a sentence, the heads of a table, and its rows with a remark on each."""
    columns, taken = columns_of(block), list[tuple[Level, BoardRow]]()
    for level in block.levels:  # one rounding may win at several levels
        if level.take and all(level.take != row for _, row in taken):
            taken.append((level, level.take))
    known = [c for c in columns if any(c.text(row) != "-" for _, row in taken)]
    shown = [c for c in known if c.name in FIRST] or columns[:1]
    costs = [c for c in known if c.name in COSTS]
    best: dict[str, list[str]] = {}
    unsure, rows = [], []
    for level, row in taken:
        alone = level.alone or not level.sentences
        remark = "best" if row.mark == BEST or level.rounding_wins else "only one" if alone else "no winner"
        best.setdefault(name_of(row, row.label), []).extend([read_of(row)] * (remark == "best"))
        unsure += [read_of(row)] * (remark == "no winner")
        cost = ", ".join(COSTS[c.name].format(text) for c in costs if (text := c.text(row)) != "-")
        cost = cost.replace("none as fast", "not faster yet")
        rows.append((row, remark, [read_of(row), *(c.text(row) for c in shown), cost]))
    said = [f"{name} at {listed(reads)}" for name, reads in best.items() if reads]
    sentence = f"Best for the FFN bytes it reads: {'; '.join(said)}." if said else ""
    sentence += f" At {listed(unsure)} the tests find no winner; the table shows the first row." if unsure else ""
    return sentence.strip(), ["FFN bytes read", *(c.title for c in shown), "costs"], rows


def facts(cells: Sequence[ReportCell], records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return (term, description) pairs: the model, the settings of its run, versions, dates. records: of all seeds."""
    environments = [c.record.environment for c in cells]
    days = unique(c.record.created[:10] for c in cells)
    versions = [(p, unique(e[p] for e in environments if e.get(p))) for p in PACKAGES]
    limits = ("all" if v is None else f"the first {v if v >= 1 else sparsity(v)}" for v in _raw(cells, "limit"))
    found = [
        ("Model", listed(unique(model_of(c.record.inputs["model"]) for c in cells), 12)),
        ("Documents", f"{listed(unique(limits))} of each task"),
        ("Precision, device", f"{listed(_of(cells, 'dtype'))}, {listed(_of(cells, 'device'))}"),
        ("Scope, execution", f"{listed(_of(cells, 'scope'))}, {listed(_of(cells, 'execution'))}"),
        ("Seed", listed(unique(r.inputs["seed"] for r in records))),
        ("Versions", ", ".join(f"{p} {listed(v)}" for p, v in versions if v)),
        ("Machine", listed(unique(_machine(e) for e in environments if "machine" in e))),
        ("Run", " to ".join(dict.fromkeys((days[0], days[-1])))),
    ]
    return [(term, text) for term, text in found if text.strip(" ,")]


def _machine(environment: Mapping[str, str]) -> str:
    parts = [environment["machine"], environment.get("gpu", "")]
    if "threads" in environment:  # older records lack it
        parts.append(f"{environment['threads']} threads" if environment["threads"] != "1" else "1 thread")
    return " with ".join(part for part in parts if part)


def warnings(
    cells: Sequence[ReportCell], files: Sequence[Path], untold: Mapping[str, Sequence[str]], failed: Sequence[str]
) -> list[str]:
    """Return sentences about weak or incomparable numbers, and about missing parts of the page.

    Args:
        files: the unreadable record files of the folder.
        untold: `Samples` or `Prompts` -> cells without them.
        failed: names of cells that failed.
    """
    records = [c.record for c in cells]
    found = [*_few(cells), *_mixed(cells), *cut_prompts(records)]
    if half := [d for d in _of(cells, "dtype") if d in HALF]:
        found.append(f"Computed in {listed(half)}: the batch size moves last digits.")
    if loose := [c for c in cells if c.record.effective_sparsity < 0.9 * c.record.inputs["sparsity"]]:
        low = min(loose, key=lambda c: c.record.effective_sparsity / c.record.inputs["sparsity"])
        found.append(
            f"Some of the counted tokens of {listed([c.place for c in loose], 2)} ran dense, so that the effective "
            f"sparsity is lower than what was asked for ({low.record.effective_sparsity:.2f} under {low.place})."
        )
    broken = [f"{c.place} ({m.metric})" for c in cells for m in c.record.metrics
              if m.part_of is None and not finite(m.value)]  # fmt: skip
    if broken:
        found.append(f"There is no finite value for {listed(broken, 4)}: the charts leave it out.")
    if failed:
        found.append(f"Failed, see the folder failed: {listed(failed, 4)}.")
    if files:
        count = "1 record" if len(files) == 1 else f"{len(files)} records"
        found.append(f"The page leaves out {count} that could not be read: {listed([f.name for f in files], 4)}.")
    for what, places in untold.items():
        if places:
            found.append(f"{what} could not be read for {listed(places, 4)}: they are not among the documents.")
    return found


def _few(cells: Sequence[ReportCell]) -> list[str]:
    small = [m for c in cells for m in metrics.main(m for m in c.record.metrics if m.part_of is None) if m.n < FEW]
    if not small:
        return []
    low, high = min(m.n for m in small), max(m.n for m in small)
    counts = f"{low}" if low == high else f"{low} to {high}"
    return [f"{listed(sorted({m.task for m in small}))} had {counts} documents: with more, the order may change."]


def _mixed(cells: Sequence[ReportCell]) -> list[str]:
    found = {name: unique("default" if v is None else v for v in _raw(cells, name)) for name in ALIKE}
    found["code"] = [code[:HASH_DIGITS] for code in found["code"]]
    for package in sorted({n for v in _raw(cells, "versions") for n in v or {}}):
        found[package] = unique((v or {}).get(package, "unknown") for v in _raw(cells, "versions"))
    return [f"Cells differ in {name}: {listed(values)}." for name, values in found.items() if len(values) > 1]


def _raw(cells: Sequence[ReportCell], name: str) -> list[Any]:
    return [c.record.inputs.get(name) for c in cells if matters(name, c.record.inputs)]


def _of(cells: Sequence[ReportCell], name: str) -> list[str]:
    return unique(v for v in _raw(cells, name) if v is not None)


def unique(values: Iterable[object]) -> list[str]:
    """Return distinct values as text, sorted."""
    return sorted({str(v) for v in values})


def listed(items: Sequence[str], most: int = 6) -> str:
    """Return `a, b and c`; after `most` items, the number of the others."""
    shown = [*items[:most], f"{len(items) - most} more"] if len(items) > most else list(items)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
