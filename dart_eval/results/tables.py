"""The long tables: every metric of every cell, and what each cell cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from dart_eval.results import metrics, show
from dart_eval.results.format import NO_NUMBER, THREE, count, number, size, sparsity, with_error
from dart_eval.results.frame import cells_frame, in_order
from dart_eval.results.record import Record
from dart_eval.results.show import Columns, Table

QUALITY: Columns = {
    "n": ("n", str), "effective": ("effective_sparsity", THREE), "masked out": ("mask_sparsity", THREE),
    "read": ("weights_read", THREE), "scope": ("scope", str),
}  # fmt: skip
QUALITY_NOTE = (
    "Value ± standard error. sparsity: target share of FFN weight bytes that a token does not read. effective: share "
    "that all scored or generated tokens did not read, dense ones included. masked out: share of neurons outside the "
    "mask. read: share of FFN weight bytes that a pruned token reads."
)
COSTS: Columns = {
    "read": ("weights_read", THREE), "context": ("flops_context_tokens", partial(number, digits=0)),
    "prefill": ("prefill", count), "decode": ("decode", count), "/ dense": ("ratio", THREE),
    "re-masks": ("remasks", str), "weights": ("memory_weights", size), "memory": ("memory_beside", size),
    "state": ("memory_state", size), "peak": ("memory_peak", size), "seconds": ("seconds", partial(number, digits=1)),
    "tokens/s": ("speed", partial(number, digits=1)),
}  # fmt: skip
COSTS_NOTE = (
    "read: share of FFN weight bytes that a pruned token reads. FLOPs are counted from shapes (a multiply-add is two) "
    "at the mean context length of the cell, with all that the method adds, re-masks included. decode: FLOPs of a "
    "decoded token; / dense: over those of a dense one. Runs multiply by masks, so these FLOPs count a model that "
    "skips the pruned neurons; they are not time saved. weights: bytes of the model. memory: bytes beside it while one "
    "sequence decodes. state: what each further sequence adds. peak: largest memory of the process (CPU) or of the GPU "
    "during the cell. seconds: of the whole cell. tokens/s: its scored or generated tokens / seconds."
)


def quality(lines: pd.DataFrame, records: Sequence[Record]) -> list[Table]:
    """Return the tables of every metric of every cell: accuracy, summaries, perplexity, distances and others.

    Args:
        lines: a row per cell and metric (`frame.lines`).
        records: of the same cells.
    """
    if lines.empty:
        return []
    texts = [with_error(*m) for m in zip(lines["metric"], lines["value"], lines["stderr"], strict=True)]
    data = lines.assign(text=pd.Series(texts, lines.index, dtype=object))
    groups = data["metric"].map(lambda label: metrics.kind_of(label).group)
    return [_quality(group, data[groups == group], records) for group in metrics.GROUPS if (groups == group).any()]


def _quality(group: str, data: pd.DataFrame, records: Sequence[Record]) -> Table:
    line = ["task", "key"]
    texts = data.pivot_table("text", line, "metric", aggfunc="last").add_prefix("text ")
    rows = in_order(data.drop_duplicates(line).join(texts, on=line))
    shown = sorted(data["metric"].unique(), key=metrics.order)
    taken = {*_place(rows), *QUALITY}
    values: Columns = {f"{name} (metric)" if name in taken else name: (f"text {name}", str) for name in shown}
    columns = {**_place(rows), **values, **QUALITY}
    notes = [f"Model {rows['model'].iloc[0]}."] if rows["model"].nunique() == 1 else []
    if (data["text"] == NO_NUMBER).any():
        notes.append(f"{NO_NUMBER}: answers were NaN or infinite; run the cell again in another dtype.")
    own = [r for r in records if r.key in set(rows["key"])]
    notes += [QUALITY_NOTE, *upper_bounds(own), *about(own), *cut_prompts(own)]
    return show.table(group, rows, columns, notes, QUALITY)


def costs(records: Sequence[Record]) -> Table:
    """Return what every cell cost: FLOPs with the method's own work, bytes read, memory and time."""
    data = cells_frame(records)
    data["speed"] = data["tokens"] / data["seconds"]
    if "flops_overhead_prefill" in data:  # of the cells of other programs nothing may be counted
        data["prefill"] = data["flops_prefill"] + data["flops_overhead_prefill"]
        data["decode"] = data["flops_decode_step_pruned"] + data["flops_overhead_decode_step"]
        data["ratio"] = data["decode"] / data["flops_decode_step_dense"]
    return show.table("Costs", data, {**_place(data), **COSTS}, [COSTS_NOTE, *about(records)], COSTS)


def _place(data: pd.DataFrame) -> Columns:
    """Return the columns that identify a cell; the model only if there are several."""
    columns: Columns = {"task": ("task", str), "method": ("label", str), "sparsity": ("sparsity", sparsity)}
    return columns if data["model"].nunique() == 1 else {"model": ("model", str), **columns}


def upper_bounds(records: Sequence[Record]) -> list[str]:
    """Return a sentence that names upper bounds, if there are any."""
    names = list(dict.fromkeys(str(r.settings["method"]) for r in records if r.settings.get("upper_bound")))
    return [f"Upper bounds, which look ahead: {', '.join(names)}."] if names else []


def about(records: Sequence[Record]) -> list[str]:
    """Return a sentence if some reads are about right alone."""
    names = dict.fromkeys(str(r.inputs["model"]["name"]) for r in records if r.settings.get("about"))
    return [f"Reads of {', '.join(names)} are about: by the bits of its configuration."] if names else []


def cut_prompts(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each task with prompts that were cut to the context."""
    sentences: dict[str, None] = {}
    for r in records:
        parts = [p for p in r.by_task.values() if "cut" in p]
        cut, asked = (sum(int(p.get(name, 0)) for p in parts) for name in ("cut", "documents"))
        if cut:
            length = int(max(p.get("length", 0) for p in parts))
            said = f"{cut} of {asked} prompts of {r.inputs['task']} {'was' if cut == 1 else 'were'} cut"
            sentences[f"{said} to fit with the answer into {length} tokens."] = None
    return list(sentences)
