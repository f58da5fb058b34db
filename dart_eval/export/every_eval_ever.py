"""Every Eval Ever: one JSON file a cell, and beside it one line for each document and metric.

The schema has no field for pruning: what made the numbers stands in `generation_config.additional_details`, as texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dart_eval.export.datasets import Dataset, of_task
from dart_eval.export.facts import Facts
from dart_eval.export.teller import Teller
from dart_eval.export.writing import NO_PLACE, LeftOut, Piece
from dart_eval.results.documents import answers, written
from dart_eval.results.format import finite
from dart_eval.results.labels import grouped
from dart_eval.results.metrics import DISTANCE, kind_of
from dart_eval.results.record import Metric
from dart_eval.util.errors import remark
from dart_eval.util.files import safe
from dart_eval.util.text import Json

SCHEMA = "0.3.0"
COLLECTION = "dart-eval"
LARGEST = 700.0  # exp of more is no number
LOCAL = "local"  # the developer of a model whose name has none


@dataclass(frozen=True)
class Scale:
    """The schema's facts about a metric.

    Attributes:
        id: the metric's name across projects; lm-eval's own if others do not have it.
        low, high: its bounds; None if no bound holds for every task.
        error: the method behind its standard error.
    """

    id: str
    low: float | None = None
    high: float | None = None
    error: str | None = None


LM_EVAL = "lm-evaluation-harness"
SCALES = {
    "acc": Scale("accuracy", 0, 1, "analytic"),
    "acc_norm": Scale(f"{LM_EVAL}.acc_norm", 0, 1, "analytic"),
    "exact_match": Scale("exact-match", 0, 1, "analytic"),
    "rouge1": Scale("rouge1", 0, 1, "analytic"),
    "rouge2": Scale("rouge2", 0, 1, "analytic"),
    "rougeL": Scale("rougeL", 0, 1, "analytic"),
    "bleu": Scale(f"{LM_EVAL}.bleu", 0, 100, "jackknife"),
    "word_perplexity": Scale(f"{LM_EVAL}.word_perplexity", 1, math.inf, "delta method"),
    "byte_perplexity": Scale(f"{LM_EVAL}.byte_perplexity", 1, math.inf, "delta method"),
    "bits_per_byte": Scale(f"{LM_EVAL}.bits_per_byte", 0, math.inf, "delta method"),
}  # fmt: skip


def pieces(cells: Sequence[Facts], datasets: Mapping[str, Dataset], teller: Teller) -> list[Piece]:
    """The paths of the project's datastore: `data/COLLECTION/DEVELOPER/MODEL/UUID.json`."""
    found = []
    for cell in cells:
        name = uuid.UUID(bytes=hashlib.sha256(cell.record.key.encode()).digest()[:16], version=4)
        developer, model = _names(cell.model)
        base = f"data/{COLLECTION}/{safe(developer)}/{safe(model.replace('/', '_'))}/{name}"
        made = partial(_files, cell, base, datasets, teller)
        found.append(Piece((f"{base}.json", f"{base}_samples.jsonl"), made))
    return found


def _names(model: str) -> tuple[str, str]:
    """Return developer and name of a model."""
    developer, slash, name = model.partition("/")
    return (developer, name) if slash and developer and name else (LOCAL, model)


def _files(cell: Facts, base: str, datasets: Mapping[str, Dataset], teller: Teller) -> dict[str, str]:
    results = [
        _result(cell, metric, of_task(metric.task, cell.leaves(), datasets))
        for metric in cell.record.metrics
        if metric.higher_is_better is not None and math.isfinite(metric.value)
    ]
    if not results:
        raise LeftOut(f"{cell.task} under {cell.title} has no number that is better one way", NO_PLACE)
    log = {**_log(cell, teller), "evaluation_results": results}
    texts = {}
    samples = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _rows(cell))
    if samples:
        texts[f"{base}_samples.jsonl"] = samples
        log["detailed_evaluation_results"] = {
            "format": "jsonl", "file_path": f"{base}_samples.jsonl", "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(samples.encode()).hexdigest(), "total_rows": samples.count("\n"),
        }  # fmt: skip
    texts[f"{base}.json"] = json.dumps(log, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    return texts


def _log(cell: Facts, teller: Teller) -> Json:
    """Return the entries of a file other than its results."""
    environment, model, moment = cell.record.environment, cell.inputs["model"], cell.moment
    developer, _ = _names(cell.model)
    return {
        "schema_version": SCHEMA,
        "evaluation_id": _id(cell),
        **({"evaluation_timestamp": str(moment.timestamp())} if moment else {}),
        "retrieved_timestamp": str(time.time()),
        "source_metadata": {
            "source_name": "dart-eval", "source_type": "evaluation_run",
            "source_organization_name": teller.organisation, "evaluator_relationship": teller.relationship,
            **({"source_organization_url": teller.page} if teller.page else {}),
        },
        "eval_library": {
            "name": "dart-eval", "version": environment.get("dart-eval", "unknown"),
            "additional_details": _words(environment),
        },
        "model_info": {
            "name": cell.model, "id": cell.model, "developer": developer,
            "inference_engine": {"name": "transformers", "version": environment.get("transformers", "unknown")},
            "additional_details": _words({
                "deployment_type": "self_deployed", "model_availability": "unknown", "pruned": cell.title,
                **{k: v for k, v in model.items() if k != "name"},
            }),
        },
    }  # fmt: skip


def _id(cell: Facts) -> str:
    return f"{cell.task}/{cell.model}/{cell.record.key}"


def _result(cell: Facts, metric: Metric, dataset: Dataset | None) -> Json:
    name, _, filter_ = metric.metric.partition(",")
    scale = SCALES.get(name, Scale(f"{LM_EVAL}.{name}"))
    bounded = scale.low is not None and scale.high is not None and scale.low <= metric.value <= scale.high
    source: Json = {"dataset_name": metric.task, "source_type": "other"}
    if dataset is not None:
        split = {"hf_split": dataset.split} if dataset.split else {}
        source |= {"source_type": "hf_dataset", "hf_repo": dataset.id, **split}
    command = cell.record.settings.get("command")
    error = {} if metric.stderr is None or not math.isfinite(metric.stderr) else {
        "standard_error": {"value": metric.stderr, **({"method": scale.error} if scale.error else {})}
    }  # fmt: skip
    return {
        "evaluation_result_id": _result_id(metric),
        "evaluation_name": metric.task,
        "source_data": source,
        "metric_config": {
            "metric_id": scale.id, "metric_name": metric.metric, "lower_is_better": not metric.higher_is_better,
            **({"metric_parameters": {"filter": filter_}} if filter_ else {}),
            **({"score_type": "continuous", "min_score": _bound(scale.low), "max_score": _bound(scale.high)}
               if bounded else {"additional_details": {"bounds_status": "unknown"}}),
        },
        "score_details": {"score": metric.value, "uncertainty": {**error, "num_samples": metric.n}},
        "generation_config": {
            "generation_args": {"execution_command": command} if command else {},
            "additional_details": _words({**cell.details(), **_undirected(cell, metric.task)}),
        },
    }  # fmt: skip


def _result_id(metric: Metric) -> str:
    return f"{metric.task}/{metric.metric}"


def _bound(value: float | None) -> float | str | None:
    return "Infinity" if value == math.inf else value


def _undirected(cell: Facts, task: str) -> Json:
    """Return a task's numbers without a direction, such as a summary's length: the schema has no place for them."""
    return {f"metric.{m.metric}": m.value for m in cell.record.metrics if m.task == task and m.higher_is_better is None}


def _words(values: Json) -> dict[str, str]:
    """Return values as texts, as the schema requires, without unknown ones."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
        if value is not None
    }


# -- one line for each document and metric -----------------------------------------------------------------------------


def _rows(cell: Facts) -> Iterator[Json]:
    """Return lines of the metrics with a value for each document; groups have none, their members do."""
    samples, texts = cell.store.samples(cell.record), cell.store.texts(cell.record)
    if samples and not texts:
        remark(f"{cell.task} under {cell.title}: its prompts were not kept, so its documents are left out")
        return
    known = (m for m in cell.record.metrics if m.higher_is_better is not None and math.isfinite(m.value))
    metrics = grouped(known, lambda m: (m.task, m.metric.partition(",")[2] or "none"))
    for sample in samples:
        asked = texts.get((sample["task"], sample["doc_id"]))
        for metric in metrics.get((sample["task"], sample["filter"]), []) if asked else []:
            name = metric.metric.partition(",")[0]
            score = _score(name, sample["metrics"].get(name))
            if asked is not None and score is not None:
                yield _row(cell, metric, sample, asked, score)


def _score(name: str, value: object) -> float | None:
    """Return a document's part in a metric, or None if it has no own number (BLEU counts over all documents)."""
    kind = kind_of(name).kind
    if isinstance(value, bool):
        return float(value)
    if name == "perplexity" and finite(value):  # of lm-eval's LAMBADA: the log-likelihood of one document
        value = [value, 1]
    if kind in ("log-perplexity", "bits", "ratio"):
        if not (isinstance(value, list) and len(value) == 2 and all(map(finite, value)) and value[1]):
            return None
        ratio = value[0] / value[1]
        value = ratio if kind == "ratio" else -ratio / math.log(2) if kind == "bits" else math.exp(min(-ratio, LARGEST))
    return float(value) if finite(value) else None


def _row(cell: Facts, metric: Metric, sample: Json, asked: Json, score: float) -> Json:
    prompt, choices, target = asked.get("prompt") or "", asked.get("choices"), asked.get("target")
    if choices and "acc_mutual_info" in sample["metrics"]:  # each was scored twice (`answers`)
        choices = choices[: len(choices) // 2]
    right = choices[target] if choices and isinstance(target, int) and 0 <= target < len(choices) else target
    reference = [str(r) for r in right] if isinstance(right, list) else [str(right)]
    hashed = json.dumps({"raw": prompt, "reference": reference}, sort_keys=True, separators=(",", ":"))
    kept = ("doc_hash", "prompt_hash", "target_hash", "filter", "cluster", "tokens", "remasks", "effective_sparsity")
    return {
        "schema_version": SCHEMA,
        "evaluation_id": _id(cell), "model_id": cell.model,
        "evaluation_name": metric.task, "evaluation_result_id": _result_id(metric),
        "sample_id": str(sample["doc_id"]), "sample_hash": hashlib.sha256(hashed.encode()).hexdigest(),
        "interaction_type": "single_turn",
        "input": {"raw": prompt, "reference": reference, **({"choices": choices} if choices else {})},
        "output": {"raw": [r if isinstance(r, str) else json.dumps(r) for r in written(sample)]},
        "answer_attribution": _attribution(metric, sample, choices),
        "evaluation": {"score": score, "is_correct": _judges(metric) and score == 1.0},
        "metadata": _words({name: sample.get(name) for name in kept}),
    }  # fmt: skip


def _judges(metric: Metric) -> bool:
    """Whether a metric says that an answer is right: `empty` and agreement with dense do not."""
    return bool(metric.higher_is_better) and kind_of(metric.metric).group != DISTANCE


def _attribution(metric: Metric, sample: Json, choices: Sequence[str] | None) -> list[Json]:
    """Return the answer taken from the output, if it is known: `acc_norm` chooses by lengths of its own."""
    responses = answers(sample)
    scores = [r[0] for r in responses if isinstance(r, list) and r and finite(r[0])]
    if choices and metric.metric == "acc" and len(choices) == len(scores) == len(responses):
        best = scores.index(max(scores))
        answer, how = choices[best], "largest log-likelihood"
    elif not choices and len(responses) == 1 and isinstance(responses[0], str):
        answer, how = responses[0], sample["filter"]
    else:
        return []
    return [{
        "turn_idx": 0, "source": "output.raw", "extracted_value": answer, "extraction_method": how, "is_terminal": True,
    }]  # fmt: skip
