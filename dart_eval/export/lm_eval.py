"""lm-eval's own files: `results_DATE.json` and `samples_TASK_DATE.jsonl`, as its EvaluationTracker writes them.

lm-eval knows no pruner, so each setting is a run of its own, and the model's name says how it was pruned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial

from dart_eval.export.datasets import DEFAULT, Dataset
from dart_eval.export.facts import Facts
from dart_eval.export.writing import Piece, readable
from dart_eval.results.labels import grouped
from dart_eval.results.record import Metric
from dart_eval.util.files import safe
from dart_eval.util.text import Json

BOOTSTRAPS = 1000  # the resamples that `evaluation.evaluate` asks lm-eval for
NAMED = ("task", "doc_id", "filter", "doc_hash", "prompt_hash", "target_hash", "metrics", "responses", "written")
# Inputs in which the cells of one run may differ: their tasks, and settings that the task alone decides.
OF_A_TASK = ("task", "task_hash", "batch_size", "share_prefix")


@dataclass
class Run:
    """Cells that lm-eval would have run with one command: only the task differs."""

    cells: list[Facts] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> Facts:
        """Any of the cells, for their common facts."""
        return self.cells[0]

    @property
    def moment(self) -> datetime:
        """The time when the last cell finished."""
        known = [cell.moment for cell in self.cells]
        return max((m for m in known if m is not None), default=datetime.fromtimestamp(0, timezone.utc))

    @property
    def model(self) -> str:
        """The model's name, with the pruner if it was pruned."""
        cell = self.first
        return f"{cell.model}@{cell.named('@')}" if cell.prunes else cell.model


def pieces(cells: Sequence[Facts], datasets: Mapping[str, Dataset]) -> list[Piece]:
    """Return a folder a setting, with the results of all its tasks and a file of samples for each."""
    found: list[Piece] = []
    taken: set[str] = set()
    for digest, run in _runs(cells):
        folder = safe(f"{run.model}-{digest}")
        moment = run.moment
        while (date := moment.replace(tzinfo=None).isoformat().replace(":", "-")) and f"{folder}/{date}" in taken:
            moment += timedelta(microseconds=1)
        taken.add(f"{folder}/{date}")
        names = {leaf: f"{folder}/samples_{safe(leaf)}_{date}.jsonl" for cell in run.cells for leaf in cell.leaves()}
        results = f"{folder}/results_{date}.json"
        found.append(Piece((results, *names.values()), partial(_files, run, results, names, datasets)))
    return found


def _runs(cells: Sequence[Facts]) -> list[tuple[str, Run]]:
    """Group cells that differ only in their task; each group gets a few digits that distinguish it."""
    found: dict[str, list[Run]] = {}
    for cell in cells:
        shared = {k: v for k, v in cell.inputs.items() if k not in OF_A_TASK}
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]
        runs = found.setdefault(digest, [])
        leaves = set(cell.leaves())
        room = (run for run in runs if not any(leaves & set(other.leaves()) for other in run.cells))
        run = next(room, None)
        if run is None:
            runs.append(run := Run())
        run.cells.append(cell)
    return [(digest, run) for digest, runs in found.items() for run in runs]


def _files(run: Run, results: str, names: Mapping[str, str], datasets: Mapping[str, Dataset]) -> dict[str, str]:
    texts: dict[str, str] = {}
    hashes = {}
    kept: list[Facts] = []
    for cell, (asked, samples) in readable(run.cells, lambda c: (c.store.texts(c.record), c.store.samples(c.record))):
        kept.append(cell)
        for task, own in grouped(samples, lambda sample: sample["task"]).items():
            rows = [_sample(sample, asked.get((task, sample["doc_id"]), {})) for sample in own]
            texts[names[task]] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            joined = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)
            hashes[task] = hashlib.sha256(joined.encode()).hexdigest()
    data = {**results_of(Run(kept), datasets), "task_hashes": hashes}
    texts[results] = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    return texts


def _sample(sample: Json, asked: Json) -> Json:
    """Return a document as lm-eval logs it, without its fields and generation options, which a run does not store."""
    prompt, choices = asked.get("prompt"), asked.get("choices")
    arguments = [[prompt, choice] for choice in choices] if choices else [[prompt]]
    answers = [[str(x) for x in a] if isinstance(a, list) else str(a) for a in sample["responses"]]
    return {
        "doc_id": sample["doc_id"], "doc": {"prompt": prompt, "choices": choices},
        "target": str(asked.get("target", "")),
        "arguments": {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(row)} for i, row in enumerate(arguments)
        },
        "resps": [[answer] for answer in sample.get("written", answers)],
        "filtered_resps": answers, "filter": sample["filter"],
        "metrics": list(sample["metrics"]),
        **{name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")},
        **sample["metrics"],
        "dart_eval": {k: v for k, v in sample.items() if k not in NAMED},
    }  # fmt: skip


def results_of(run: Run, datasets: Mapping[str, Dataset]) -> Json:
    """Return the file of results with lm-eval's entries, and `dart_eval` for facts without an entry there."""
    first, environment = run.first, run.first.record.environment
    said = first.inputs.get("system_instruction")
    return {
        **_scores(run), **_tasks(run, datasets), "config": _settings(first),
        "dart_eval": {c.task: {**c.details(), "flops": c.record.flops} for c in run.cells},
        "git_hash": None, "date": run.moment.timestamp(),
        "pretty_env_info": "\n".join(f"{name}: {value}" for name, value in sorted(environment.items())),
        "transformers_version": environment.get("transformers", "N/A"),
        "lm_eval_version": environment.get("lm_eval", "N/A"), "upper_git_hash": None,
        "model_source": "dart-eval", "model_name": run.model, "model_name_sanitized": safe(run.model),
        "system_instruction": said,
        "system_instruction_sha": hashlib.sha256(said.encode()).hexdigest() if said else None,
        "fewshot_as_multiturn": first.inputs.get("fewshot_as_multiturn"),
        "chat_template": None, "chat_template_sha": None,  # a record states that there was one, not its text
        "total_evaluation_time_seconds": str(sum(c.record.seconds for c in run.cells)),
    }  # fmt: skip


def _scores(run: Run) -> Json:
    """Return metrics of tasks and groups, and the tasks of each group."""
    by_task: dict[str, list[Metric]] = {}
    members: dict[str, list[str]] = {}
    for metric in (m for cell in run.cells for m in cell.record.metrics):
        by_task.setdefault(metric.task, []).append(metric)
        if metric.part_of is None:
            members.setdefault(metric.task, [])
        elif metric.task not in members.setdefault(metric.part_of, []):
            members[metric.part_of].append(metric.task)
    results = {task: _values(task, metrics) for task, metrics in by_task.items()}
    groups = {task: results[task] for task, below in members.items() if below and task in results}
    return {
        "results": results, **({"groups": groups} if groups else {}), "group_subtasks": members,
        "higher_is_better": {
            task: {m.metric.partition(",")[0]: m.higher_is_better for m in metrics} for task, metrics in by_task.items()
        },
    }  # fmt: skip


def _values(task: str, metrics: Sequence[Metric]) -> Json:
    found: Json = {"name": task, "alias": task, "sample_len": metrics[0].n}
    for m in metrics:
        name, _, filter_ = m.metric.partition(",")
        found[f"{name},{filter_ or 'none'}"] = m.value
        found[f"{name}_stderr,{filter_ or 'none'}"] = "N/A" if m.stderr is None else m.stderr
    return found


def _tasks(run: Run, datasets: Mapping[str, Dataset]) -> Json:
    """Return the recorded facts about the documents' tasks; a record has their hash, not their YAML."""
    configs, shots, sizes = {}, {}, {}
    for cell in run.cells:
        sample_counts = {m.task: m.n for m in cell.record.metrics}
        for task in cell.leaves():
            config: Json = {"task": task}
            if task in datasets:
                name = datasets[task].task
                config |= {"dataset_path": datasets[task].id, "dataset_name": None if name == DEFAULT else name}
            if cell.inputs.get("num_fewshot") is not None:
                config["num_fewshot"] = shots[task] = cell.inputs["num_fewshot"]
            configs[task] = config
            asked = sample_counts.get(task)
            if asked is not None:
                sizes[task] = {"original": asked if cell.inputs.get("limit") is None else None, "effective": asked}
    return {"configs": configs, "versions": {}, "n-shot": shots, "n-samples": sizes}


def _settings(cell: Facts) -> Json:
    """Return lm-eval's `config`: the model with its pruner as arguments, and the settings of the run."""
    inputs, seed = cell.inputs, cell.inputs.get("seed")
    model = inputs["model"]
    return {
        "model": "dart-eval",
        "model_args": {
            "pretrained": cell.model, "revision": model.get("revision"), "dtype": inputs.get("dtype"),
            "pruner": cell.pruner, "sparsity": cell.sparsity, "scope": inputs["scope"],
        },
        "model_dtype": inputs.get("dtype"), "model_revision": model.get("revision"),
        "model_sha": model.get("weights") or model.get("revision"),
        "batch_size": cell.record.settings.get("batch_size"), "batch_sizes": [], "device": inputs.get("device"),
        "use_cache": None, "limit": inputs.get("limit"), "bootstrap_iters": BOOTSTRAPS,
        "gen_kwargs": inputs.get("gen_kwargs"),
        "random_seed": seed, "numpy_seed": seed, "torch_seed": seed, "fewshot_seed": seed,
    }  # fmt: skip
