"""One cell: run a task through lm-eval on the (perhaps pruned) model and gather its numbers."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple
from unittest.mock import patch

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task

from dart_eval.evaluation.costs import Cost, distance_metrics
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.tasks import Tasks, cluster, documents, leaves, whole_tokens
from dart_eval.evaluation.unsafe import block_local_code
from dart_eval.pruning.session import Session
from dart_eval.results import sums
from dart_eval.results.metrics import kind_of
from dart_eval.results.record import Metric
from dart_eval.results.store import Journal
from dart_eval.util.text import Json

BOOTSTRAPS = 1000  # only for the few metrics that lm-eval bootstraps


class TaskResult(NamedTuple):
    """Numbers of one cell: metrics, samples, texts of the documents, cost in all and per lm-eval task.

    Attributes:
        prompts: per lm-eval task: number of `documents`, number of `cut` prompts, and most tokens of prompt and
            answer (`length`).
    """

    metrics: list[Metric]
    samples: list[Json]
    texts: list[Json]
    cost: Cost
    by_task: dict[str, Cost]
    prompts: dict[str, dict[str, int]]


def evaluate_task(
    lm: PrunedLM, session: Session, tasks: Tasks, name: str, settings: EvalSettings, journal: Journal
) -> TaskResult:
    """Run lm-eval's `simple_evaluate` on one task, group or tag.

    Prompts and metrics are lm-eval's; its response cache stays off. Answers in the journal are not computed again.
    """
    items = tasks.load(name)
    lm.begin(session, documents(items), journal, settings.scope, whole_tokens=whole_tokens(items))
    results = _simple_evaluate(lm, tasks, items, settings)
    by_task: dict[str, Cost] = defaultdict(Cost)
    for (task, _), used in lm.costs.items():
        by_task[task] += used
    by_name = {task.task_name: task for task in leaves(items)}
    asked, cut = Counter(task for task, _ in lm.costs), Counter(task for task, _ in lm.cut)
    metrics = _metrics(results, items)
    metrics += _distances(metrics, results.get("group_subtasks") or {}, lm.costs)
    return TaskResult(
        metrics, _samples(results["samples"], lm, by_name), _texts(results["samples"], by_name),
        sum(lm.costs.values(), Cost()), by_task,
        {task: {"documents": asked[task], "cut": cut[task], "length": lm.max_length} for task in by_task},
    )  # fmt: skip


def scores(items: Sequence[Task | Group]) -> bool:
    """Whether some of these tasks score answers that are given."""
    return any(task.OUTPUT_TYPE != "generate_until" for task in leaves(list(items)))


def gather(lm: PrunedLM, tasks: Tasks, name: str, settings: EvalSettings) -> None:
    """Run dense on the answers that a task scores, for its states alone."""
    items = [task for task in leaves(tasks.load(name)) if scores([task])]
    lm.begin(Session(), documents(items), lm.journal, whole_tokens=whole_tokens(items))
    _simple_evaluate(lm, tasks, items, settings)


def _simple_evaluate(lm: PrunedLM, tasks: Tasks, items: Sequence[Task | Group], settings: EvalSettings) -> Json:
    first = leaves(list(items))[0].task_name
    turns = settings.fewshot_as_multiturn
    with (
        patch.object(lm_eval.api.task, "tqdm", lambda iterable, **_: iterable),  # its own bar
        patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None),  # of the working directory
        block_local_code(f"task {first}", tasks.unsafe_code),
        redirect_stdout(sys.stderr),  # lm-eval prints that it bootstraps, and tasks print, beside --format json
    ):
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=list(items),
            task_manager=tasks.manager,  # or lm-eval would index all its tasks again
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=settings.chat_template,
            system_instruction=settings.system_instruction,
            **({} if turns is None else {"fewshot_as_multiturn": turns}),
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            log_samples=True,
            confirm_run_unsafe_code=tasks.unsafe_code,
        )


def _metrics(results: Json, items: Sequence[Task | Group]) -> list[Metric]:
    whole = [group for item in items if isinstance(item, Group) for group in (item, *item.get_all_groups())]
    by_size = {(g.name, m.metric): m.weight_by_size for g in whole for m in g.aggregate_metric_list or ()}
    groups: dict[str, list[str]] = results.get("group_subtasks") or {}
    # A group without a metric of its own (a list of tasks) hides none of its members.
    scored = {task for task, values in results["results"].items() if any("," in name for name in values)}
    parents = {child: parent for parent, children in groups.items() if parent in scored for child in children}
    sizes = {task: counts["effective"] for task, counts in results["n-samples"].items()}
    found = []
    for task, values in results["results"].items():
        better = _directions(task, groups, results["higher_is_better"])
        n = sum(sizes.get(member, 0) for member in _members(task, groups))
        for name, value in values.items():
            metric, _, filter_ = name.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_}")
            if not isinstance(stderr, (int, float)) or math.isnan(stderr):
                of = results["samples"].get(task, [])
                stderr = _stderr(metric, [s[metric] for s in of if metric in s and s["filter"] == filter_])
            direction = better.get(metric, True)  # null in a task's file, and so None: neither is better
            direction = direction if direction is None else bool(direction)
            found.append(Metric(
                task, metric, float(value), stderr, n, direction, parents.get(task), filter_,
                weights="documents" if by_size.get((task, metric), True) else "tasks",
            ))  # fmt: skip
    return found


def _directions(task: str, groups: dict[str, list[str]], of_tasks: Json) -> Json:
    """Return whether higher is better, metric by metric; None where a group's members differ.

    lm-eval leaves it out for a group of groups.
    """
    found: dict[str, set[bool | None]] = {}
    for member in _members(task, groups):
        for metric, better in (of_tasks.get(member) or {}).items():
            found.setdefault(metric, set()).add(better)
    return {metric: values.pop() if len(values) == 1 else None for metric, values in found.items()}


def _distances(
    metrics: Sequence[Metric], groups: Mapping[str, list[str]], costs: Mapping[tuple[str, int], Cost]
) -> list[Metric]:
    """Return the distances from dense of each task and group, if measured. metrics: their other metrics."""
    rows: list[Metric] = []
    for task in dict.fromkeys(m.task for m in metrics):
        like = next(m for m in metrics if m.task == task)
        members = _members(task, groups)
        own = [c.distance for (name, _), c in costs.items() if name in members and c.distance.positions]
        rows += distance_metrics(own, like) if own else []
    return rows


def _members(task: str, groups: Mapping[str, list[str]]) -> set[str]:
    """Return the tasks of a group at any depth, or the task itself."""
    below = groups.get(task)
    return set().union(*(_members(t, groups) for t in below)) if below else {task}


def _stderr(metric: str, values: list[Any]) -> float | None:
    """Return the standard error of a metric that lm-eval gives without one; None if its values have another shape."""
    kind = kind_of(metric).kind
    if metric == "bleu" and all(isinstance(v, (tuple, list)) and len(v) == 10 for v in values):
        return sums.bleu_error(values)
    if metric == "perplexity" and all(isinstance(v, (int, float)) for v in values):  # lm-eval's own: equal weights
        values = [(v, 1) for v in values]
    if kind not in ("log-perplexity", "bits") or not all(isinstance(v, (tuple, list)) and len(v) == 2 for v in values):
        return None
    return sums.as_recorded(kind, values)[1] if sum(w for _, w in values) > 0 else None


def _samples(by_task: dict[str, list[Json]], lm: PrunedLM, tasks: dict[str, Task]) -> list[Json]:
    """Return samples for paired statistics and readers: hashes, metrics, answers, cost. Texts are separate."""
    rows = []
    for name, samples in sorted(by_task.items()):
        for s in samples:
            used = lm.costs.get((name, s["doc_id"]), Cost())
            text = lm.texts.get((name, s["doc_id"]))
            texts = [r for of in s["resps"] for r in of if isinstance(r, str)]
            metrics = {m: _plain(s[m]) for m in s["metrics"]} | used.distance.pairs()
            gold = _gold(tasks[name], s["doc"])
            if gold is not None:
                metrics["gold_ll"] = float(s["filtered_resps"][gold][0])
            rows.append({
                "task": name, "doc_id": s["doc_id"], "filter": s["filter"], "cluster": cluster(tasks[name], s["doc"]),
                "doc_hash": s["doc_hash"], "prompt_hash": s["prompt_hash"], "target_hash": s["target_hash"],
                "metrics": metrics, "responses": [_plain(r) for r in s["filtered_resps"]],
                "tokens": used.tokens, "remasks": used.remasks, "effective_sparsity": used.effective_sparsity,
                **({"drift": used.trace} if used.trace else {}),
                **({"kl_bins": used.distance.bins} if used.distance.bins else {}),
                **({"token_ids": text.token_ids, "limited": text.limited} if text is not None else {}),
                **({"texts": len(texts)} if len(texts) > 1 else {}),
                **({"written": texts} if texts and s["filter"] != "none" else {}),
            })  # fmt: skip
    return rows


def _gold(task: Task, doc: Json) -> int | None:
    """Return the index of a multiple-choice document's right answer; None for other tasks, or without a single one."""
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask):
        return None
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _texts(by_task: dict[str, list[Json]], tasks: dict[str, Task]) -> list[Json]:
    """Return each document's prompt and right answer, for readers; the same under every method."""
    rows = {}
    for name, samples in sorted(by_task.items()):
        for s in samples:
            requests = [[str(a) for a in args[:2]] for args in s["arguments"]]
            choices, prompt = None, requests[0][0]
            if tasks[name].OUTPUT_TYPE == "multiple_choice":
                same = all(context == prompt for context, _ in requests)
                choices = [answer if same else context + answer for context, answer in requests]
                prompt = prompt if same else ""
            gold = _gold(tasks[name], s["doc"])
            target = gold if gold is not None else _plain(s["target"])
            rows[name, s["doc_id"]] = {
                "task": name, "doc_id": s["doc_id"], "prompt": prompt, "choices": choices, "target": target
            }  # fmt: skip
    return list(rows.values())


def _plain(value: object) -> object:
    """Convert a value to JSON's own types: numpy scalars and arrays, tuples and subclasses of float become plain."""
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
