"""Records of results by hand."""

import hashlib
import json
import math

import numpy as np

from dart_eval.results import show
from dart_eval.results.frame import lines, lines_of
from dart_eval.results.record import Metric, Record
from dart_eval.results.store import Store
from dart_eval.results.tables import costs, quality

ARC = (Metric("arc_easy", "acc", 0.6251, 0.0123, 400, True), Metric("arc_easy", "acc_norm", 0.5, None, 400, True))


FLOPS = {
    "context_tokens": 40, "prefill": 4_000_000, "decode_step_dense": 200_000, "decode_step_pruned": 150_000,
    "overhead_prefill": 900, "overhead_decode_step": 12.5, "overhead_share": 12.5 / 200_000, "remask": 700,
    "ffn_share": 0.5,
}  # fmt: skip


def record(method="dart", sparsity=0.5, params=None, metrics=ARC, key="k1", model="tiny", created="2026-01-01"):
    """A record for tests of storing and showing: its numbers are told apart at sight, and its key is given."""
    inputs = {
        "model": {"name": model, "revision": None, "weights": "f00d"}, "dtype": "float32", "method": method,
        "params": params or {}, "sparsity": sparsity, "scope": "scored", "task": "arc_easy", "num_fewshot": None,
        "limit": 400, "seed": 0,
    }  # fmt: skip
    return Record(
        key=key, inputs=inputs, metrics=list(metrics), mask_sparsity=0.5004, effective_sparsity=0.4321,
        weights_read=0.4996, tokens=1234, remasks=3, flops=FLOPS,
        memory={"weights": 2**20, "beside": 3000, "state": 512},
        settings={"batch_size": 8, "command": "dart-eval run"}, environment={"torch": "2"},
        measured={"seconds": 1.5, "created": created, "peak": 3 * 2**20},
        samples=[{
            "task": "arc_easy", "doc_id": 0, "filter": "none", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
            "metrics": {"acc": 1.0}, "responses": [],
        }],
    )  # fmt: skip


def table_body(text):
    """The cells of a markdown table's rows, heads first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def sealed(data):
    """A record's data with the digest that fits."""
    data = {k: v for k, v in data.items() if k != "digest"}
    return {**data, "digest": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}


N = 60


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def samples(task, values, data="v1", filter_="none", clusters=None):
    """One sample per entry of `values`: {metric: value}."""
    return [
        {
            "task": task, "doc_id": i, "filter": filter_, "doc_hash": digest(f"{task} {i} {data}"),
            "prompt_hash": digest(f"prompt {task} {i} {data}"), "target_hash": digest(f"target {i}"),
            "cluster": clusters[i] if clusters else None, "metrics": metrics, "responses": [],
            "tokens": 5, "remasks": 0, "effective_sparsity": 0.5,
        }
        for i, metrics in enumerate(values)
    ]  # fmt: skip


def metric_of(task, name, values, up=True, part_of=None):
    """The record's metric over `samples`' values."""
    if name in ("kl", "top1"):
        x, w = np.array([v[name] for v in values]).sum(0)
        found = x / w
    elif name.endswith("perplexity"):
        ll, w = np.array([v[name] for v in values]).sum(0)
        found = math.exp(-ll / w)
    else:
        found = float(np.mean([v[name] for v in values]))
    return Metric(task, name, found, 0.01, len(values), up, part_of)


def answered(
    task, values, method="dart", sparsity=0.5, up=True, created="2026-01-01", metrics=None, lines=None, **changes
):
    """A record for tests of statistics: `values` ({metric: value} per document) give its metrics and samples."""
    params = changes.pop("params", {} if method == "dense" else {"allocation": "depth", "detect": True})
    inputs = {
        "model": {"name": "tiny", "revision": None, "weights": "f00d"}, "dtype": "float32", "device": "cpu",
        "method": method, "params": params, "sparsity": sparsity, "scope": "scored", "execution": "masked",
        "task": task, "task_hash": "t", "num_fewshot": None, "limit": None, "seed": 0, "max_length": None,
        "chunk": 2048, "chat_template": False, "cue": None, "batch_size": None, "share_prefix": None,
        "calibration": "c", "code": "c0de", "method_code": None, "versions": {"torch": "2.4"}, **changes,
    }  # fmt: skip
    if metrics is None:
        metrics = [metric_of(task, name, values, up) for name in values[0] if name != "gold_ll"]
    return Record(
        key=digest(json.dumps(inputs, sort_keys=True) + created), inputs=inputs, metrics=metrics, mask_sparsity=0.5,
        effective_sparsity=0.5, weights_read=0.5, tokens=1, remasks=0, flops={},
        memory={"weights": 1, "beside": 1, "state": 1},
        settings={"batch_size": 8, "command": "dart-eval run"}, environment={},
        measured={"seconds": 1.0, "created": created, "peak": 1}, samples=lines or samples(task, values),
    )  # fmt: skip


def rows(records, subtasks=False):
    """The rows of records, of which none stands beside dense."""
    return lines_of({}, records, subtasks).to_dict("records")


def beside_dense(folder, *records):
    """The rows of these records, saved into a folder, beside dense: by method and metric."""
    store = Store(save(folder, *records))
    found = lines(store, store.load()).to_dict("records")
    return {(line["method"], line["metric"]): line for line in found}


def tables(records, subtasks=False):
    """The long tables of records."""
    return [*quality(lines_of({}, records, subtasks), records), costs(records)]


def render(records, form, subtasks=False):
    """The rows of records as csv or json, or their long tables as md or tex."""
    if form in ("csv", "json"):
        return show.data_text(lines_of({}, records, subtasks), form)
    return show.render(tables(records, subtasks), form)


def choosing(record, options=4):
    """The record with as many choices a document: the first is right, and is chosen where `acc` says so."""
    for s in record.samples:
        scores = [-1.0] * options
        scores[0 if s["metrics"]["acc"] else 1] = -0.5
        s["responses"] = [[score, False] for score in scores]
    return record


def save(folder, *records):
    for record in records:
        Store(folder).save("cell", record)
    return folder


def right(share, n=N, seed=0):
    """0/1 accuracies."""
    return [{"acc": float(x)} for x in np.random.default_rng(seed).random(n) < share]


def perplexities(scale, n=N, seed=0):
    generator = np.random.default_rng(seed)
    w = generator.integers(50, 500, n)
    return [{"word_perplexity": [float(-x * scale * generator.gamma(9, 0.3)), int(x)]} for x in w]


def cell(method="dart", sparsity=0.5, task="arc_easy", metrics=None, model="tiny", samples=(), **inputs):
    """A record for pages of many: its key follows from what it is of, its values from the sparsity or as given."""
    made = [Metric(task, "acc", 0.6 - 0.3 * sparsity, 0.02, 400, True), Metric(task, "acc_norm", 0.5, None, 400, True)]
    key = hashlib.sha256(repr((model, method, sparsity, task, sorted(inputs.items()))).encode()).hexdigest()
    dense = {**FLOPS, "decode_step_pruned": 200_000, "overhead_share": 0.0}
    return Record(
        key=key,
        inputs={
            "model": {"name": model, "revision": None, "weights": "f00dfeed1234"}, "dtype": "float32", "device": "cpu",
            "method": method, "params": {}, "sparsity": sparsity, "scope": "scored", "execution": "masked",
            "task": task, "task_hash": "1", "num_fewshot": None, "limit": 400, "seed": 0, "code": "c0de",
            "versions": {"torch": "2"}, **inputs,
        },
        metrics=list(made if metrics is None else metrics), mask_sparsity=sparsity, effective_sparsity=sparsity,
        weights_read=1 - sparsity, tokens=1234, remasks=3, flops=dense if method == "dense" else FLOPS,
        memory={"weights": 2**20, "beside": 0 if method == "dense" else 3000, "state": 0 if method == "dense" else 512},
        settings={"batch_size": 8, "command": f"dart-eval run --method {method} --tasks {task}"},
        environment={"torch": "2", "machine": "x86_64"}, by_task={task: {}},
        measured={"seconds": 1.5, "created": "2026-01-02T03:04:05+00:00", "peak": 3 * 2**20}, samples=list(samples),
    )  # fmt: skip


def written(doc, text, task="xsum", **more):
    return {
        "task": task, "doc_id": doc, "filter": "none", "doc_hash": f"d{doc}", "prompt_hash": f"p{doc}",
        "target_hash": "t", "cluster": None, "metrics": {"rougeL": 0.25, "bleu": [1] * 10}, "responses": [text],
        "tokens": 30, "remasks": 1, "effective_sparsity": 0.48, **more,
    }  # fmt: skip
