"""Statistics of generated texts: their lengths, the detector's alarms, and the bytes that tokens did not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from dart_eval.results.format import THREE, number, sparsity
from dart_eval.results.record import Record
from dart_eval.results.rows import cells_frame
from dart_eval.results.writers import Column, Table, from_frame
from dart_eval.util.text import Json

COLUMNS = (
    Column("task"), Column("method", "label"), Column("sparsity", text=sparsity), Column("texts"),
    Column("new tokens", "mean", partial(number, digits=1)), Column("longest"),
    Column("alarms / 100", "alarms", partial(number, digits=2)), Column("re-masks", "each", partial(number, digits=2)),
    Column("effective", "effective_sparsity", THREE), Column("with re-masks", "with_remasks", THREE),
)  # fmt: skip
NOTE = (
    "new tokens: mean per text, thoughts included; longest: most in a text. alarms / 100: detector alarms per 100 new "
    "tokens. re-masks: mean per text. effective: share of the FFN weights that the new tokens did not read, dense "
    "tokens included. with re-masks: the same, minus the share of the weights that re-masks read."
)


def table(records: Sequence[Record], counts: Mapping[str, dict[str, object] | None]) -> list[Table]:
    """Return a table of all cells that generated texts, if any. counts: by key, the result of `of_texts` for a cell."""
    import pandas as pd

    rows = [{"key": key, **said} for key, said in counts.items() if said]
    if not rows:
        return []
    frame = cells_frame(records).merge(pd.DataFrame(rows, dtype=object), on="key")
    columns = [Column("model"), *COLUMNS] if frame["model"].nunique() > 1 else COLUMNS
    return [from_frame("Generated texts", frame, columns, NOTE)]


def of_texts(record: Record, samples: Sequence[Json]) -> dict[str, object] | None:
    """Return counts of a cell's texts; None without texts. samples: one for each document and filter."""
    texts = {(s["task"], s["doc_id"]): s for s in samples if s["responses"] and isinstance(s["responses"][0], str)}
    tokens = [int(s.get("tokens", 0)) for s in texts.values()]
    if not sum(tokens):
        return None
    count = sum(s.get("texts", 1) for s in texts.values())
    alone = count == len(tokens)  # of several texts of a document only the sums are known
    alarms = sum(len((s.get("drift") or {}).get("alarms") or []) for s in texts.values())
    watched = "remask.patience" in record.inputs["params"]
    return {
        "texts": count, "mean": sum(tokens) / count, "longest": max(tokens) if alone else None,
        "alarms": 100 * alarms / sum(tokens) if watched and alone else None,
        "each": sum(s.get("remasks", 0) for s in texts.values()) / count,
        "with_remasks": with_remasks(record),
    }  # fmt: skip


def with_remasks(record: Record) -> float | None:
    """Return the effective sparsity minus the reads of re-masks per token; None if unknown.

    A re-mask from the ring reads gate and up once more. One from dense tokens is in the effective sparsity already.
    Older records have it only for 16-bit weights.
    """
    reads = record.flops.get("remask_bytes")
    if reads is None and "ffn_bits" not in record.inputs:
        reads = record.flops.get("remask_reads")
    if reads is None:
        return None
    return record.effective_sparsity - (0.0 if record.inputs["params"].get("remask.dense_tokens") else reads)
