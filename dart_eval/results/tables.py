"""Tables of records: rows as data (json, csv), and for people (md, tex, a terminal)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dart_eval.results import writers
from dart_eval.results.record import Record
from dart_eval.results.writers import Table
from dart_eval.text import json_text

FORMATS = ("md", "csv", "tex", "json")
# Settings of a run: columns of json and csv, and named in the tables for people where the records differ in them.
RUN_SETTINGS = (
    "dtype", "device", "num_fewshot", "limit", "seed", "max_length", "chunk", "chat_template", "cue", "batch_size",
    "share_prefix",
)  # fmt: skip
HASHES = ("calibration", "code", "method_code")  # told apart by their first digits
NAMED = ("scope", "execution", *RUN_SETTINGS, *HASHES)  # what a label says beside method and parameters
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
    found = []
    for record in records:
        cell = record.inputs
        for m in record.metrics:
            if m.part_of is not None and not subtasks:
                continue
            used = record.by_task.get(m.task, {})  # a member of a tag or group; the whole cell otherwise
            found.append({
                "model": cell["model"]["name"], "method": cell["method"], "params": cell["params"],
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
            made.append(_quality(title, chosen, present, names, cut_prompts(_of(records, chosen))))
    named = {metric for _, metrics in QUALITY for metric in metrics}
    rest = [r for r in data if r["metric"] not in named]
    if rest:
        present = sorted({r["metric"] for r in rest})
        made.append(_quality("Other metrics", rest, present, names, cut_prompts(_of(records, rest))))
    return [*made, _flops(records, names), _memory(records, names)]


def _of(records: Sequence[Record], data: Sequence[dict[str, Any]]) -> list[Record]:
    """The records that rows are of."""
    keys = {r["key"] for r in data}
    return [r for r in records if r.key in keys]


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


def labels(records: Sequence[Record], by_task: bool = False) -> dict[str, str]:
    """A label per cell key: the method's name, and whatever else tells two cells of the table apart.

    Parameters where one name stands for several settings; settings of the run where the records differ in them.

    by_task: settings only where cells of one task differ in them (each task may have a limit of its own).
    """
    apart: set[str] = set()
    packages: list[str] = []
    for group in _by_task(records) if by_task else [records]:
        apart |= {s for s in NAMED if len({json.dumps(r.inputs.get(s)) for r in group}) > 1}
        packages += _moved_packages(group)
    differing, moved = [s for s in NAMED if s in apart], list(dict.fromkeys(packages))
    models = {(r.inputs["model"]["name"], json.dumps(r.inputs["model"], sort_keys=True)) for r in records}
    same_name = len(models) > len({name for name, _ in models})  # other weights or another revision
    variants: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r.inputs["params"] not in variants.setdefault(r.inputs["method"], []):
            variants[r.inputs["method"]].append(r.inputs["params"])
    typed = _typed(records, variants)
    found = {}
    for r in records:
        name, params = r.inputs["method"], r.inputs["params"]
        names = sorted({k for v in variants[name] for k in v if any(v.get(k) != w.get(k) for w in variants[name])})
        label = ":".join([name, *(f"{k}={_plain(params.get(k))}" for k in names)])
        if len(variants[name]) > 1 and name in typed:
            label = r.settings["method"]
        settings = [f"{s}={_plain(r.inputs.get(s))[: 8 if s in HASHES else 40]}" for s in differing]
        settings += [f"{p}={(r.inputs.get('versions') or {}).get(p, 'none')}"[:40] for p in moved]
        if same_name:
            which = r.inputs["model"].get("weights") or r.inputs["model"].get("revision")
            settings.insert(0, f"model={str(which)[:8]}")
        found[r.key] = f"{label} ({' '.join(settings)})" if settings else label
    return found


def _typed(records: Sequence[Record], variants: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Methods whose settings are told apart by what a user types: the parameters that are not the defaults."""
    specs: dict[str, set[str]] = {}
    for r in records:
        params = json.dumps(r.inputs["params"], sort_keys=True)
        specs.setdefault(r.inputs["method"], set()).add(json.dumps([r.settings.get("method"), params]))
    return {
        name
        for name, pairs in specs.items()
        if len({json.loads(p)[0] for p in pairs} - {None}) == len(pairs) == len(variants[name])
    }


def _by_task(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(str(r.inputs["task"]), []).append(r)
    return list(groups.values())


def _moved_packages(records: Sequence[Record]) -> list[str]:
    """As few packages as tell the records' versions apart."""
    versions = [r.inputs.get("versions") or {} for r in records]
    moved = [n for n in sorted({n for v in versions for n in v}) if len({v.get(n) for v in versions}) > 1]
    moved.sort(key=lambda n: -len({v.get(n) for v in versions}))
    chosen: list[str] = []

    def kinds(names: Sequence[str]) -> int:
        return len({tuple(v.get(n) for n in names) for v in versions})

    for name in moved:
        if kinds([*chosen, name]) > kinds(chosen):
            chosen.append(name)
    return chosen


def _plain(value: Any) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        "Value ± standard error. sparsity: pruned share of FFN neurons asked for; effective: pruned neuron-tokens / "
        "all neuron-tokens of the scored or generated tokens; mask: what the masks prune; "
        "read: FFN weights a pruned token reads."
    )
    if not many:
        note = f"Model {data[0]['model']}. {note}"
    return Table(title, columns, body, " ".join([note, *remarks]))


def _order(r: dict[str, Any], names: dict[str, str]) -> tuple[Any, ...]:
    return r["model"], r["task"], r["sparsity"], names[r["key"]]


def _value(r: dict[str, Any] | None) -> str:
    if r is None:
        return "-"
    digits = 4 if abs(r["value"]) < 10 else 1 if abs(r["value"]) >= 100 else 2
    if r["metric"] == "summary_words":
        digits = 1
    text = f"{r['value']:.{digits}f}"
    return text if r["stderr"] is None else f"{text} ± {r['stderr']:.{digits}f}"


def _flops(records: Sequence[Record], names: dict[str, str]) -> Table:
    body, many = [], _model_column(records)
    for r in _sorted(records, names):
        f = r.flops
        dense, pruned, share = f.get("decode_step_dense"), f.get("decode_step_pruned"), f.get("tracing_share")
        body.append([
            *_where(r, many), names[r.key], f"{r.inputs['sparsity']:g}", str(f.get("context_tokens", "-")),
            _si(f.get("prefill")), _si(dense), _si(pruned), f"{pruned / dense:.3f}" if dense and pruned else "-",
            _si(f.get("tracing_prefill")), _si(f.get("tracing_decode_step")),
            "-" if share is None else f"{100 * share:.3f} %", str(r.remasks),
            f"{100 * f.get('renewals_read', 0):.2f} %",
        ])  # fmt: skip
    columns = [*_heads(many), "method", "sparsity", "context", "prefill", "decode dense", "decode pruned", "ratio",
               "tracing prefill", "tracing/token", "of dense", "re-masks", "their reads"]  # fmt: skip
    note = (
        "FLOPs from shapes (a multiply-add is two) at the mean context length of the cell; tracing/token includes "
        "the re-masks seen; their reads: FFN weights that these read, per decoded token, of all FFN weights. "
        "Execution is by masks: these are the FLOPs that skipping the pruned neurons leaves, "
        "not time saved."
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
