"""lm-eval's own files: `results_DATE.json` and `samples_TASK_DATE.jsonl`, as its EvaluationTracker writes them.

lm-eval knows no pruner, so each setting is a run of its own, and the model's name says how it was pruned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from dart_eval.results.inputs import DENSE, grouped, specs
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import check_name, safe, write
from dart_eval.util.text import Json, bits_text

NAMED = ("task", "doc_id", "filter", "doc_hash", "prompt_hash", "target_hash", "metrics", "responses", "written")
# Inputs in which the cells of one run may differ: their tasks, and settings that the task alone decides.
OF_A_TASK = ("task", "task_hash", "batch_size", "share_prefix")


def export(store: Store, folder: Path, force: bool = False) -> list[Path]:
    """Write results as lm-eval does, a folder for each setting; unreadable cells are named on stderr and left out.

    Raises:
        UserError: an earlier export is there and `force` is not given, no cell can be read, or a file not written.
    """
    check_name(folder, "--output")
    records = store.load()
    pruners, runs = specs(records), _runs(records)
    places = [folder / safe(f"{_title(run[0], pruners)}-{_digest(run[0])}") for run in runs]
    if not force and (there := next(filter(Path.exists, places), None)):
        raise UserError(f"{there} would be replaced", "give --force, or another --output")
    texts: dict[Path, str] = {}
    for run, place in zip(runs, places, strict=True):
        cells, hashes = [], {}
        moment = max(datetime.fromisoformat(cell.created).replace(tzinfo=timezone.utc) for cell in run)
        while (results := place / f"results_{(date := f'{moment:%Y-%m-%dT%H-%M-%S.%f}')}.json") in texts:
            moment += timedelta(microseconds=1)
        for cell in run:
            try:
                asked, samples = store.texts(cell), store.samples(cell)
            except UserError as error:
                remark(f"left out: {error}")
                continue
            cells.append(cell)
            for task, of_task in grouped(samples, lambda sample: str(sample["task"])).items():
                rows = [_sample(sample, asked.get((task, sample["doc_id"]), {})) for sample in of_task]
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                texts[place / f"samples_{safe(task)}_{date}.jsonl"] = lines
                joined = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)
                hashes[task] = hashlib.sha256(joined.encode()).hexdigest()
        if cells:
            data = {**_results(cells, pruners, moment), "task_hashes": hashes}
            texts[results] = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    if not texts:
        raise UserError("there is nothing to export", "give a folder with finished cells")
    for file, text in texts.items():
        write(file, text, "make room or choose another --output")
    return sorted(texts)


def _runs(records: Sequence[Record]) -> list[list[Record]]:
    """Group the cells that lm-eval would have run with one command: only the task differs."""
    runs: dict[str, list[list[Record]]] = {}
    for record in records:
        alike, leaves = runs.setdefault(_digest(record), []), {*_leaves(record)}
        if (run := next((r for r in alike if not any(leaves & {*_leaves(cell)} for cell in r)), None)) is None:
            alike.append(run := [])
        run.append(record)
    return [run for alike in runs.values() for run in alike]


def _digest(record: Record) -> str:
    shared = {name: value for name, value in record.inputs.items() if name not in OF_A_TASK}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def _leaves(record: Record) -> list[str]:
    """The lm-eval tasks of the documents: the task itself, or the members of a group or tag."""
    return list(record.by_task) or [str(record.inputs["task"])]


def _title(record: Record, pruners: Mapping[str, str]) -> str:
    """Return the model's name, with the pruner if it was pruned or rounded."""
    name, inputs = str(record.inputs["model"]["name"]), record.inputs
    if inputs["method"] == DENSE and not inputs.get("ffn_bits"):
        return name
    bits = f"-on-{bits_text(inputs['ffn_bits'])}".replace(" ", "-") if inputs.get("ffn_bits") else ""
    return f"{name}@{pruners[record.key]}{bits}" + (f"@{inputs['sparsity']:g}" if inputs["sparsity"] else "")


def _sample(sample: Json, asked: Json) -> Json:
    """Return a document as lm-eval logs it, without its fields and generation options, which a run does not store."""
    prompt, choices = asked.get("prompt"), asked.get("choices")
    arguments = [[prompt, choice] for choice in choices] if choices else [[prompt]]
    answers = [[str(x) for x in a] if isinstance(a, list) else str(a) for a in sample["responses"]]
    return {
        "doc_id": sample["doc_id"], "doc": {"prompt": prompt, "choices": choices},
        "target": str(asked.get("target", "")),
        "arguments": {f"gen_args_{i}": {f"arg_{j}": a for j, a in enumerate(row)} for i, row in enumerate(arguments)},
        "resps": [[answer] for answer in sample.get("written", answers)], "filtered_resps": answers,
        **{name: sample[name] for name in ("filter", "doc_hash", "prompt_hash", "target_hash")},
        "metrics": list(sample["metrics"]), **sample["metrics"],
        "dart_eval": {k: v for k, v in sample.items() if k not in NAMED},
    }  # fmt: skip


def _results(cells: Sequence[Record], pruners: Mapping[str, str], moment: datetime) -> Json:
    """Return the file of results: lm-eval's entries, and `dart_eval` with the record of each cell."""
    inputs, title, environment = cells[0].inputs, _title(cells[0], pruners), cells[0].environment
    said, shots, limit = (inputs.get(name) for name in ("system_instruction", "num_fewshot", "limit"))
    metrics = [metric for cell in cells for metric in cell.metrics]
    results: dict[str, Json] = {}
    directions: dict[str, Json] = {}
    members: dict[str, list[str]] = {m.task: [] for m in metrics if m.part_of is None}
    for m in metrics:
        error = "N/A" if m.stderr is None else m.stderr
        own = results.setdefault(m.task, {"name": m.task, "alias": m.task, "sample_len": m.n})
        own |= {f"{m.metric},{m.filter}": m.value, f"{m.metric}_stderr,{m.filter}": error}
        directions.setdefault(m.task, {})[m.metric] = m.higher_is_better
        if m.part_of is not None and m.task not in members.setdefault(m.part_of, []):
            members[m.part_of].append(m.task)
    sizes = {leaf: results[leaf]["sample_len"] for cell in cells for leaf in _leaves(cell) if leaf in results}
    groups = {task: results[task] for task, below in members.items() if below and task in results}
    return {
        "results": results, **({"groups": groups} if groups else {}), "group_subtasks": members,
        "higher_is_better": directions, "versions": {}, "n-shot": {} if shots is None else dict.fromkeys(sizes, shots),
        "configs": {leaf: {"task": leaf, "num_fewshot": shots} for leaf in sizes},
        "n-samples": {leaf: {"original": n if limit is None else None, "effective": n} for leaf, n in sizes.items()},
        "config": {
            "model": "dart-eval", "pruner": pruners[cells[0].key], "batch_size": cells[0].settings.get("batch_size"),
            "model_args": {"pretrained": inputs["model"]["name"], **{k: inputs[k] for k in ("sparsity", "scope")}},
        },
        "dart_eval": {str(cell.inputs["task"]): {"pruner": pruners[cell.key], **cell.to_json()} for cell in cells},
        "git_hash": None, "upper_git_hash": None, "date": moment.timestamp(), "model_source": "dart-eval",
        "pretty_env_info": "\n".join(f"{name}: {value}" for name, value in sorted(environment.items())),
        **{f"{name}_version": environment.get(name, "N/A") for name in ("transformers", "lm_eval")},
        "model_name": title, "model_name_sanitized": safe(title), "system_instruction": said,
        "system_instruction_sha": hashlib.sha256(said.encode()).hexdigest() if said else None,
        "fewshot_as_multiturn": inputs.get("fewshot_as_multiturn"), "chat_template": None, "chat_template_sha": None,
        "total_evaluation_time_seconds": str(sum(cell.measured["seconds"] for cell in cells)),
    }  # fmt: skip
