"""Tables of records: rows as data (json, csv), and for people (md, tex, a terminal)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from dart_eval.results import writers
from dart_eval.results.labels import RUN_SETTINGS, labels
from dart_eval.results.record import Record
from dart_eval.results.writers import Table
from dart_eval.text import json_text

NO_NUMBER = "no number"
FORMATS = ("md", "csv", "tex", "json")
# Tables of quality: title, and the metrics that are its columns. Any other metric goes to a table of its own.
QUALITY = (
    ("Accuracy", ("acc", "acc_norm", "exact_match", "em", "f1", "mcc")),
    ("Summaries", ("rouge1", "rouge2", "rougeL", "bleu", "summary_words", "empty")),
    ("Perplexity (lower is better)", ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")),
)


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
                **{s: cell.get(s) for s in RUN_SETTINGS},
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


def tables(records: Sequence[Record], subtasks: bool = False) -> list[Table]:
    """Accuracy, summaries, perplexity, FLOPs and memory, those that have rows."""
    data = rows(records, subtasks)
    names = labels(records)
    made: list[Table] = []
    for title, metrics in QUALITY:
        chosen = [r for r in data if r["metric"] in metrics]
        if chosen:
            present = [m for m in metrics if any(r["metric"] == m for r in chosen)]
            made.append(_quality(title, chosen, present, names, _remarks(_of(records, chosen))))
    named = {metric for _, metrics in QUALITY for metric in metrics}
    rest = [r for r in data if r["metric"] not in named]
    if rest:
        present = sorted({r["metric"] for r in rest})
        made.append(_quality("Other metrics", rest, present, names, _remarks(_of(records, rest))))
    return [*made, _flops(records, names), _memory(records, names)]


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
    title: str, data: list[dict[str, Any]], metrics: list[str], names: dict[str, str], remarks: Sequence[str]
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
        *metrics,
        "n",
        "effective",
        "mask",
        "read",
        "scope",
    ]
    body = []
    for (task, key), by_metric in sorted(lines.items(), key=lambda item: _order(next(iter(item[1].values())), names)):
        r = next(iter(by_metric.values()))
        body.append([
            *([r["model"]] if many else []), task, names[key], f"{r['sparsity']:g}",
            *(_value(by_metric.get(m)) for m in metrics), str(r["n"]), f"{r['effective_sparsity']:.3f}",
            f"{r['mask_sparsity']:.3f}", f"{r['weights_read']:.3f}", r["scope"],
        ])  # fmt: skip
    note = (
        "Value ± standard error. sparsity: share of the FFN weights that a token is not to read. effective: share that "
        "the scored or generated tokens did not read, dense ones included. mask: share of the neurons outside the "
        "mask. read: share of the FFN weights that a pruned token reads."
    )
    if not many:
        note = f"Model {data[0]['model']}. {note}"
    if any(NO_NUMBER in row for row in body):
        note += (
            f" {NO_NUMBER}: answers were NaN or infinite; run the cell again, in another dtype or with other weights."
        )
    return Table(title, columns, body, " ".join([note, *remarks]))


def _order(r: dict[str, Any], names: dict[str, str]) -> tuple[Any, ...]:
    return r["model"], r["task"], r["sparsity"], names[r["key"]]


def _value(r: dict[str, Any] | None) -> str:
    if r is None:
        return "-"
    if not math.isfinite(r["value"]):
        return NO_NUMBER
    digits = 4 if abs(r["value"]) < 10 else 1 if abs(r["value"]) >= 100 else 2
    if r["metric"] == "summary_words":
        digits = 1
    text = f"{r['value']:.{digits}f}"
    return text if r["stderr"] is None else f"{text} ± {r['stderr']:.{digits}f}"


def _flops(records: Sequence[Record], names: dict[str, str]) -> Table:
    body, many = [], _model_column(records)
    for r in _sorted(records, names):
        f = r.flops
        dense, pruned, share = f.get("decode_step_dense"), f.get("decode_step_pruned"), f.get("overhead_share")
        body.append([
            *_where(r, many), names[r.key], f"{r.inputs['sparsity']:g}", str(f.get("context_tokens", "-")),
            _si(f.get("prefill")), _si(dense), _si(pruned), f"{pruned / dense:.3f}" if dense and pruned else "-",
            _si(f.get("overhead_prefill")), _si(f.get("overhead_decode_step")),
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
    return Table("FLOPs", columns, body, note)


def _memory(records: Sequence[Record], names: dict[str, str]) -> Table:
    body, many = [], _model_column(records)
    for r in _sorted(records, names):
        m = r.memory
        body.append([
            *_where(r, many), names[r.key], f"{r.inputs['sparsity']:g}",
            _mib(m.get("weights")), _mib(m.get("state"), 3), _mib(r.measured.get("peak")),
        ])  # fmt: skip
    note = (
        "MiB. state: what the method keeps per sequence. peak: of the process (CPU) or of the GPU while the cell ran."
    )
    return Table("Memory", [*_heads(many), "method", "sparsity", "weights", "state", "peak"], body, note)


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


def _si(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def _mib(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value / 2**20:.{digits}f}"


def render(records: Sequence[Record], form: str, subtasks: bool = False, more: Sequence[Table] = ()) -> str:
    """The tables as text in one of `FORMATS`; json and csv hold the rows, md and tex the tables for people.

    more: tables that follow these, for people.
    """
    if form == "json":
        return json_text(writers.finite(rows(records, subtasks))) + "\n"
    if form == "csv":
        return _csv(rows(records, subtasks))
    writer = writers.markdown if form == "md" else writers.latex
    return "\n".join(writer(t) for t in [*tables(records, subtasks), *more])


def _csv(data: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(k for r in data for k in r))
    return writers.csv_text([names, *([r.get(name) for name in names] for r in data)])
