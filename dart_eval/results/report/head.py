"""What was run, and what a reader should know before believing a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dart_eval.results.inputs import model_of
from dart_eval.results.report.cells import Cells, main_metrics, unique
from dart_eval.results.report.samples import Samples
from dart_eval.results.report.text import finite, listed, number, several, sparsity
from dart_eval.results.tables import cut_prompts

FEW = 100  # documents below which an interval is wide enough to say so
DIFFERENCES = {  # settings that a reader would not expect to differ inside a report
    "dtype": "precision", "device": "kind of device", "scope": "scope", "limit": "limit of documents",
    "num_fewshot": "number of examples in the prompt",
}  # fmt: skip
HALF = ("float16", "bfloat16", "fp16", "bf16")


def facts(cells: Cells) -> list[tuple[str, str]]:
    """(term, description) pairs: model, numbers' settings, versions, dates."""
    inputs = [r.inputs for r in cells.records]
    models = unique(
        f"{i['model']['name']}"
        + (f" @ {i['model']['revision']}" if i["model"].get("revision") else "")
        + (f" (weights {str(i['model']['weights'])[:8]})" if i["model"].get("weights") else "")
        for i in inputs
    )
    days = sorted({r.created[:10] for r in cells.records})
    levels = sorted({r.inputs["sparsity"] for r in cells.pruned})
    machines = unique(_machine(r.environment) for r in cells.records if "machine" in r.environment)
    found = [
        ("Model" if len(models) == 1 else "Models", listed(models, 12)),
        ("Methods", listed(cells.methods, 20)),
        ("Sparsity", listed([sparsity(s) for s in levels], 20)),
        ("Tasks", listed(unique(i["task"] for i in inputs), 40)),
        ("Documents", _limits(cells)),
        ("Precision, device", f"{listed(_of(cells, 'dtype'))}, {listed(_of(cells, 'device'))}"),
        ("Scope, execution", f"{listed(_of(cells, 'scope'))}, {listed(_of(cells, 'execution'))}"),
        ("Seed" if len(_of(cells, "seed")) == 1 else "Seeds", listed(_of(cells, "seed"))),
        ("Versions", ", ".join(_versions(cells))),
        ("Machine", listed(machines)),
        ("Run", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""),
    ]
    return [(term, text) for term, text in found if text.strip(" ,")]


def _machine(environment: Mapping[str, str]) -> str:
    parts = [environment["machine"], environment.get("gpu", "")]
    if "threads" in environment:  # older records lack it
        parts.append(f"{environment['threads']} threads" if environment["threads"] != "1" else "1 thread")
    return " with ".join(part for part in parts if part)


def _of(cells: Cells, name: str) -> list[str]:
    return unique(v for r in cells.records if (v := r.inputs.get(name)) is not None)


def _limits(cells: Cells) -> str:
    limits = [r.inputs.get("limit") for r in cells.records]
    words = unique("all" if v is None else f"the first {_amount(v)} of each task" for v in limits)
    return listed(words)


def _amount(limit: float) -> str:
    return f"{100 * limit:g} %" if limit < 1 else str(limit)


def _versions(cells: Cells) -> list[str]:
    shown = ("dart-eval", "python", "torch", "transformers", "lm_eval")
    return [f"{name} {listed(found)}" for name in shown
            if (found := unique(v for r in cells.records if (v := r.environment.get(name))))]  # fmt: skip


def warnings(cells: Cells) -> list[str]:
    """Sentences about what makes numbers weak or not comparable."""
    found = [*_small(cells), *_mixed(cells)]
    half = [d for d in _of(cells, "dtype") if d in HALF]
    if half:
        found.append(f"Computed in {listed(half)}: the batch size moves last digits.")
    alone = sorted({str(r.inputs["task"]) for r in cells.pruned if cells.dense(r) is None})
    if alone:
        found.append(f"No dense cell for {listed(alone)}: nothing there can be held against the unpruned model.")
    loose = [r for r in cells.pruned if r.effective_sparsity < 0.9 * r.inputs["sparsity"]]
    if loose:
        low = min(loose, key=lambda r: r.effective_sparsity / r.inputs["sparsity"])
        found.append(
            f"In {several(len(loose), 'cell')} the effective sparsity is more than a tenth below what was asked for "
            f"(least: {cells.name(low)} on {low.inputs['task']}, {low.effective_sparsity:.3f}): some of the counted "
            "tokens ran dense."
        )
    broken = [f"{cells.name(r)} on {m.task} ({m.metric})" for r in cells.records for m in r.metrics
              if m.part_of is None and not finite(m.value)]  # fmt: skip
    found += cut_prompts(cells.records)
    if broken:
        found.append(f"No finite value for {listed(broken, 4)}: left out of the charts.")
    return found


def unread(files: Sequence[Path], samples: Samples) -> list[str]:
    """Sentences about what the page lacks. files: those of the folder that hold no record."""
    found = []
    if files:
        are = "is" if len(files) == 1 else "are"
        names = listed([f.name for f in files], 4)
        found.append(f"{several(len(files), 'record')} could not be read and {are} left out: {names}.")
    for what, cells in (("Samples", samples.unread), ("Prompts", samples.untold)):
        if cells:
            found.append(f"{what} could not be read for {listed(cells, 4)}: the sample explorer lacks them.")
    return found


def _small(cells: Cells) -> list[str]:
    main = [m for r in cells.records for m in main_metrics(r) if m.n < FEW]
    if not main:
        return []
    tasks = sorted({m.task for m in main})
    widest = max((1.96 * m.stderr for m in main if finite(m.stderr) and m.metric in ("acc", "exact_match")), default=0)
    low, high = min(m.n for m in main), max(m.n for m in main)
    counts = str(low) if low == high else f"{low} to {high}"
    wide = f" Intervals of accuracy reach ± {number(widest)[:5]}." if widest else ""
    return [
        f"Few documents: n = {counts} for {listed(tasks)}.{wide} With more of them the order of methods may change."
    ]


def _mixed(cells: Cells) -> list[str]:
    found = []
    if len(_of(cells, "code")) > 1:
        names = listed([c[:8] for c in _of(cells, "code")])
        found.append(f"Cells from different versions of this program's numeric code are mixed ({names}).")
    versions = [r.inputs.get("versions") or {} for r in cells.records]
    moved = [n for n in sorted({n for v in versions for n in v}) if len({v.get(n) for v in versions}) > 1]
    if moved:
        found.append(f"Cells were run with different versions of {listed(moved)}.")
    for name, word in DIFFERENCES.items():
        values = unique(r.inputs.get(name) for r in cells.records)
        if len(values) > 1:
            found.append(f"Cells differ in {word}: {listed([v if v != 'None' else 'default' for v in values])}.")
    for name in cells.models:
        models = unique(model_of(r.inputs["model"]) for r in cells.records if r.inputs["model"]["name"] == name)
        if len(models) > 1:
            found.append(f"The name {name} stands for different weights ({listed(models)}).")
    return found
