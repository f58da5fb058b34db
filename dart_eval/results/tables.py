"""Tables of records: rows as data (json, csv), and for people (md, tex, a terminal)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dart_eval.results import metrics, writers
from dart_eval.results.format import NO_NUMBER, count, mebibytes, sparsity, with_error
from dart_eval.results.inputs import COLUMNS
from dart_eval.results.labels import labels
from dart_eval.results.record import Record
from dart_eval.results.writers import Table
from dart_eval.text import json_text

FORMATS = ("md", "csv", "tex", "json")
# Columns that are left out where they hold one value.
REPEATING = (
    "n", "effective", "masked out", "read", "scope", "context", "prefill", "decode dense", "decode pruned", "ratio",
    "overhead prefill", "overhead/token", "of dense", "re-masks", "re-mask reads", "weights", "extra",
)  # fmt: skip


def rows(records: Sequence[Record], subtasks: bool = False) -> list[dict[str, Any]]:
    """One row per metric of each record, sorted by model, task, metric, sparsity, method.

    subtasks: also the members of groups (mmlu's subjects).
    """
    found, names = [], labels(records)
    for record in records:
        cell = record.inputs
        for m in record.metrics:
            if m.part_of is not None and not subtasks:
                continue
            used = record.by_task.get(m.task, {})  # a member of a tag or group; the whole cell otherwise
            found.append({
                "model": cell["model"]["name"], "label": names[record.key], "method": cell["method"],
                "params": cell["params"],
                "sparsity": cell["sparsity"], "scope": cell["scope"], "task": m.task, "metric": m.metric,
                "value": m.value, "stderr": m.stderr, "n": m.n, "higher_is_better": m.higher_is_better,
                "mask_sparsity": used.get("mask_sparsity", record.mask_sparsity),
                "effective_sparsity": used.get("effective_sparsity", record.effective_sparsity),
                "weights_read": record.weights_read, "remasks": used.get("remasks", record.remasks),
                "tokens": used.get("tokens", record.tokens), "cut": used.get("cut", record.cut),
                **{s: cell.get(s) for s in COLUMNS},
                **{f"flops_{k}": v for k, v in record.flops.items()},
                **{f"memory_{k}": v for k, v in record.memory.items()}, "memory_peak": record.measured.get("peak"),
                "seconds": record.seconds, "command": record.settings.get("command"), "key": record.key,
            })  # fmt: skip
    found.sort(
        key=lambda r: (
            r["model"],
            r["task"],
            r["metric"],
            r["sparsity"],
            r["method"],
            json.dumps(r["params"]),
        )
    )
    return found


def quality(records: Sequence[Record], subtasks: bool = False) -> list[Table]:
    """Every metric of every cell: accuracy, summaries, perplexity and others, those that have rows."""
    data = rows(records, subtasks)
    names = labels(records)
    made: list[Table] = []
    for group in metrics.GROUPS:
        chosen = [r for r in data if metrics.of(r["metric"]).group == group]
        if chosen:
            order = metrics.in_group(group)
            present = sorted({r["metric"] for r in chosen}, key=lambda m: (order.index(m) if m in order else 0, m))
            made.append(_quality(group, chosen, present, names, _remarks(_of(records, chosen))))
    return made


def tables(records: Sequence[Record], subtasks: bool = False) -> list[Table]:
    """All long tables but those of the detector: every metric, FLOPs and memory."""
    return [*quality(records, subtasks), flops(records), memory(records)]


def _of(records: Sequence[Record], data: Sequence[dict[str, Any]]) -> list[Record]:
    """The records that rows are of."""
    keys = {r["key"] for r in data}
    return [r for r in records if r.key in keys]


def _remarks(records: Sequence[Record]) -> list[str]:
    """Sentences under a table of these records."""
    return [*upper_bounds(records), *cut_prompts(records)]


def upper_bounds(records: Sequence[Record]) -> list[str]:
    """A sentence that names the methods which know too much, if there are any."""
    names = list(dict.fromkeys(str(r.settings["method"]) for r in records if r.settings.get("upper_bound")))
    if not names:
        return []
    are = "is an upper bound: it knows" if len(names) == 1 else "are upper bounds: they know"
    return [f"{' and '.join(names)} {are} what no method can know in time."]


def cut_prompts(records: Sequence[Record]) -> list[str]:
    """A sentence for each task of which prompts were cut to the context."""
    found: dict[str, None] = {}
    for r in records:
        parts = [p for p in r.by_task.values() if "cut" in p]
        cut, asked = (sum(int(p.get(name, 0)) for p in parts) for name in ("cut", "documents"))
        if cut:
            length = int(max(p.get("length", 0) for p in parts))
            said = f"{cut} of {asked} prompts of {_task(r)} {'was' if cut == 1 else 'were'} cut"
            found[f"{said} to fit with the answer into {length} tokens."] = None
    return list(found)


def _model_column(records: Sequence[Record]) -> bool:
    return len({r.inputs["model"]["name"] for r in records}) > 1


def _quality(
    title: str, data: list[dict[str, Any]], shown: list[str], names: dict[str, str], remarks: Sequence[str]
) -> Table:
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in data:
        lines.setdefault((r["task"], r["key"]), {})[r["metric"]] = r
    many = len({r["model"] for r in data}) > 1
    columns = [
        *(["model"] if many else []),
        "task",
        "method",
        "sparsity",
        *shown,
        "n",
        "effective",
        "masked out",
        "read",
        "scope",
    ]
    body = []
    for (task, key), by_metric in sorted(lines.items(), key=lambda item: _order(next(iter(item[1].values())), names)):
        r = next(iter(by_metric.values()))
        body.append([
            *([r["model"]] if many else []), task, names[key], sparsity(r["sparsity"]),
            *(_value(by_metric.get(m)) for m in shown), str(r["n"]), f"{r['effective_sparsity']:.3f}",
            f"{r['mask_sparsity']:.3f}", f"{r['weights_read']:.3f}", r["scope"],
        ])  # fmt: skip
    note = (
        "Value ± standard error. sparsity: share of the FFN weights that a token is not to read. effective: share that "
        "the scored or generated tokens did not read, dense ones included. masked out: share of the neurons outside "
        "the mask. read: share of the FFN weights that a pruned token reads."
    )
    if not many:
        note = f"Model {data[0]['model']}. {note}"
    if any(NO_NUMBER in row for row in body):
        note += (
            f" {NO_NUMBER}: answers were NaN or infinite; run the cell again, in another dtype or with other weights."
        )
    return without_repeats(Table(title, columns, body, " ".join([note, *remarks])))


def _order(r: dict[str, Any], names: dict[str, str]) -> tuple[Any, ...]:
    return r["model"], r["task"], r["sparsity"], names[r["key"]]


def _value(r: dict[str, Any] | None) -> str:
    return "-" if r is None else with_error(r["metric"], r["value"], r["stderr"])


def flops(records: Sequence[Record]) -> Table:
    """What every cell computes, counted from shapes."""
    body, many, names = [], _model_column(records), labels(records)
    for r in _sorted(records, names):
        f = r.flops
        dense, pruned, share = f.get("decode_step_dense"), f.get("decode_step_pruned"), f.get("overhead_share")
        body.append([
            *_where(r, many), names[r.key], sparsity(r.inputs["sparsity"]), str(f.get("context_tokens", "-")),
            count(f.get("prefill")), count(dense), count(pruned), f"{pruned / dense:.3f}" if dense and pruned else "-",
            count(f.get("overhead_prefill")), count(f.get("overhead_decode_step")),
            "-" if share is None else f"{100 * share:.3f} %", str(r.remasks),
            f"{100 * f.get('remask_reads', 0):.2f} %",
        ])  # fmt: skip
    columns = [*_heads(many), "method", "sparsity", "context", "prefill", "decode dense", "decode pruned", "ratio",
               "overhead prefill", "overhead/token", "of dense", "re-masks", "re-mask reads"]  # fmt: skip
    note = (
        "FLOPs are counted from shapes (a multiply-add is two) at the mean context length of the cell. overhead: what "
        "the method adds, in all for the prompt and per decoded token (its re-masks included), and that as a share of "
        "a dense token's FLOPs. re-mask reads: FFN weights that re-masks read per decoded token / all FFN weights. "
        "Execution is by masks: these are the FLOPs that skipping the pruned neurons leaves, not time saved."
    )
    return without_repeats(Table("FLOPs", columns, body, note))


def memory(records: Sequence[Record]) -> Table:
    """What every cell held in memory."""
    body, many, names = [], _model_column(records), labels(records)
    for r in _sorted(records, names):
        m = r.memory
        body.append([
            *_where(r, many), names[r.key], sparsity(r.inputs["sparsity"]),
            mebibytes(m.get("weights")), mebibytes(m.get("state"), 3), mebibytes(r.measured.get("peak")),
        ])  # fmt: skip
    note = (
        "MiB. extra: what the method keeps beside the model, per sequence. peak: of the process (CPU) or of the GPU "
        "while the cell ran."
    )
    made = Table("Memory", [*_heads(many), "method", "sparsity", "weights", "extra", "peak"], body, note)
    return without_repeats(made)


def _heads(many: bool) -> list[str]:
    return ["model", "task"] if many else ["task"]


def _where(record: Record, many: bool) -> list[str]:
    return [record.inputs["model"]["name"], _task(record)] if many else [_task(record)]


def _sorted(records: Sequence[Record], names: dict[str, str]) -> list[Record]:
    return sorted(
        records,
        key=lambda r: (
            r.inputs["model"]["name"],
            _task(r),
            r.inputs["sparsity"],
            names[r.key],
        ),
    )


def _task(record: Record) -> str:
    return str(record.inputs["task"])


def without_repeats(table: Table) -> Table:
    """The table without columns that hold one value in all of several rows; the note says it once."""
    if len(table.body) < 2:
        return table
    same = {
        i: values.pop()
        for i, head in enumerate(table.columns)
        if head in REPEATING and len(values := {row[i] for row in table.body}) == 1
    }
    if not same:
        return table
    kept = [i for i in range(len(table.columns)) if i not in same]
    said = ", ".join(f"{table.columns[i]} {value}" for i, value in same.items())
    return Table(
        table.title, [table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.body],
        f"In all rows: {said}. {table.note}",
    )  # fmt: skip


def render(records: Sequence[Record], form: str, subtasks: bool = False) -> str:
    """As text in one of `FORMATS`: json and csv hold the rows, md and tex the tables for people."""
    if form == "json":
        return json_text(writers.finite(rows(records, subtasks))) + "\n"
    if form == "csv":
        return _csv(rows(records, subtasks))
    writer = writers.markdown if form == "md" else writers.latex
    return "\n".join(writer(table) for table in tables(records, subtasks))


def _csv(data: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(k for r in data for k in r))
    return writers.csv_text([names, *([r.get(name) for name in names] for r in data)])
