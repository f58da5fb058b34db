"""Tables of records: rows as data (json, csv), and for people (md, tex, a terminal)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dart_eval.results import metrics, writers
from dart_eval.results.format import NO_NUMBER, THREE, count, number, size, sparsity, with_error
from dart_eval.results.record import Record
from dart_eval.results.rows import cells_frame, in_order, metrics_frame, rows
from dart_eval.results.writers import Column, Table

if TYPE_CHECKING:
    import pandas as pd

QUALITY = (
    Column("n"), Column("effective", "effective_sparsity", THREE),
    Column("masked out", "mask_sparsity", THREE), Column("read", "weights_read", THREE),
    Column("scope"),
)  # fmt: skip
QUALITY_NOTE = (
    "Value ± standard error. sparsity: target share of FFN weight bytes that a token does not read. effective: share "
    "that all scored or generated tokens did not read, dense ones included. masked out: share of neurons outside the "
    "mask. read: share of FFN weight bytes that a pruned token reads."
)
COUNTED = ("prefill", "overhead_prefill", "decode_step_dense", "decode_step_pruned", "overhead_decode_step")
COSTS = (
    Column("read", "weights_read", THREE), Column("context", "flops_context_tokens", partial(number, digits=0)),
    Column("prefill", "prefill", count), Column("decode", "decode", count), Column("/ dense", "ratio", THREE),
    Column("re-masks", "remasks"), Column("weights", "memory_weights", size), Column("memory", "memory_beside", size),
    Column("state", "memory_state", size), Column("peak", "memory_peak", size),
    Column("seconds", text=partial(number, digits=1)), Column("tokens/s", "speed", partial(number, digits=1)),
)  # fmt: skip
COSTS_NOTE = (
    "read: share of FFN weight bytes that a pruned token reads. FLOPs are counted from shapes (a multiply-add is two) "
    "at the mean context length of the cell, with all that the method adds, re-masks included. decode: FLOPs of a "
    "decoded token; / dense: over those of a dense one. Runs multiply by masks, so these FLOPs count a model that "
    "skips the pruned neurons; they are not time saved. weights: bytes of the model. memory: bytes that lie beside the "
    "dense model while one sequence decodes, copies and codes of weights included. state: bytes that each further "
    "sequence adds. peak: largest memory of the process (CPU) or of the GPU during the cell. seconds: of the "
    "whole cell. tokens/s: its scored or generated tokens / seconds."
)


def tables(records: Sequence[Record], subtasks: bool = False) -> list[Table]:
    """Return all long tables: every metric, and the costs."""
    return [*quality(records, rows(records, subtasks)), costs(records)]


def quality(records: Sequence[Record], lines: Sequence[dict[str, object]]) -> list[Table]:
    """Return the tables of every metric of every cell: accuracy, summaries, perplexity, distances and others.

    Args:
        records: of a folder.
        lines: a row per metric (`rows`, or `frame.lines`, which have distances to dense).
    """
    data = metrics_frame(lines)
    if data.empty:
        return []
    data["text"] = [with_error(*m) for m in zip(data["metric"], data["value"], data["stderr"], strict=True)]
    groups = data["metric"].map(lambda name: metrics.kind_of(name).group)
    return [_quality(group, data[groups == group], records) for group in metrics.GROUPS if (groups == group).any()]


def _quality(group: str, data: pd.DataFrame, records: Sequence[Record]) -> Table:
    order, line = [name for name, known in metrics.METRICS.items() if known.group == group], ["task", "key"]
    shown = sorted(data["metric"].unique(), key=lambda m: (order.index(m) if m in order else 0, m))
    texts = data.pivot_table("text", line, "metric", aggfunc="last").add_prefix("text ")
    lines = in_order(data.drop_duplicates(line).join(texts, on=line))
    columns = [*_where(lines), *(Column(m, f"text {m}") for m in shown)]
    notes = [QUALITY_NOTE]
    if (data["text"] == NO_NUMBER).any():
        said = f"{NO_NUMBER}: answers were NaN or infinite; run the cell again in another dtype or with other weights."
        notes.append(said)
    if lines["model"].nunique() == 1:
        notes.insert(0, f"Model {lines['model'].iloc[0]}.")
    of = [r for r in records if r.key in set(lines["key"])]
    notes += [*upper_bounds(of), *about(of), *cut_prompts(of)]
    return writers.from_frame(group, lines, columns, " ".join(notes), QUALITY)


def flops_ratio(cells: pd.DataFrame) -> pd.Series | None:
    """Return the FLOPs of a pruned decoded token / those of a dense one."""
    dense = cells.get("flops_decode_step_dense")
    return None if dense is None else cells["flops_decode_step_pruned"] / dense


def costs(records: Sequence[Record]) -> Table:
    """Return what every cell cost: FLOPs with the method's own work, bytes read, memory and time."""
    data = cells_frame(records)
    data["speed"] = data["tokens"] / data["seconds"]
    if {f"flops_{name}" for name in COUNTED} <= {*data}:  # of the cells of other programs nothing may be counted
        data["prefill"] = data["flops_prefill"] + data["flops_overhead_prefill"]
        data["decode"] = data["flops_decode_step_pruned"] + data["flops_overhead_decode_step"]
        data["ratio"] = data["decode"] / data["flops_decode_step_dense"]
    return writers.from_frame("Costs", data, _where(data), " ".join([COSTS_NOTE, *about(records)]), COSTS)


def _where(data: pd.DataFrame) -> list[Column]:
    """Return the columns that identify a cell; the model only if there are several."""
    columns = [Column("model"), Column("task"), Column("method", "label"), Column("sparsity", text=sparsity)]
    return columns[data["model"].nunique() == 1 :]


def upper_bounds(records: Sequence[Record]) -> list[str]:
    """Return a sentence that names upper bounds, if there are any."""
    names = list(dict.fromkeys(str(r.settings["method"]) for r in records if r.settings.get("upper_bound")))
    if not names:
        return []
    are = "is an upper bound: it looks" if len(names) == 1 else "are upper bounds: they look"
    return [f"{' and '.join(names)} {are} ahead."]


def about(records: Sequence[Record]) -> list[str]:
    """Return a sentence if some reads are about right alone."""
    names = dict.fromkeys(str(r.inputs["model"]["name"]) for r in records if r.settings.get("about"))
    return [f"Reads of {', '.join(names)} are about: by the bits of its configuration."] if names else []


def cut_prompts(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each task with prompts that were cut to the context."""
    found: dict[str, None] = {}
    for r in records:
        parts = [p for p in r.by_task.values() if "cut" in p]
        cut, asked = (sum(int(p.get(name, 0)) for p in parts) for name in ("cut", "documents"))
        if cut:
            length = int(max(p.get("length", 0) for p in parts))
            said = f"{cut} of {asked} prompts of {r.inputs['task']} {'was' if cut == 1 else 'were'} cut"
            found[f"{said} to fit with the answer into {length} tokens."] = None
    return list(found)
