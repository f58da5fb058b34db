"""A hash of a task: its configuration and its documents."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from dart_eval.evaluation.documents import number_asked
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_names import tasks_dir
from dart_eval.evaluation.tasks import leaves
from dart_eval.util.source import source_hash
from dart_eval.util.text import Json


def task_hash(items: Sequence[Task | Group], settings: EvalSettings) -> str:
    """Return the sha256 of a task's configuration and of the documents in use (few-shot pool included)."""
    digest = hashlib.sha256()
    groups = [item for item in items if isinstance(item, Group)]
    for group in groups:
        rules = [_sourced(dataclasses.asdict(rule)) for rule in group.aggregate_metric_list or ()]
        digest.update(json.dumps([group.name, rules], sort_keys=True, default=str).encode() if rules else b"")
        groups += [item for item in group if isinstance(item, Group)]
    for task in sorted(leaves(list(items)), key=lambda t: t.task_name):
        raw = task.config.to_dict(keep_callable=True)
        config: Json = task.dump_config()  # functions as source
        code: list[Callable[..., object]] = [type(task), *_functions(raw)]
        if more := [found for part in code if (found := _beyond(part)) is not None]:
            config["more"] = more
        config.pop("dataset_kwargs", None)  # paths of this machine; the documents themselves are hashed below
        (config.get("metadata") or {}).pop("config_source", None)
        digest.update(json.dumps(_sourced(config), sort_keys=True, default=str).encode())
        docs = task.eval_docs
        for i in range(number_asked(task, settings.limit)):
            digest.update(json.dumps(docs[i], sort_keys=True, default=str).encode())
        if settings.num_fewshot or config.get("num_fewshot"):
            pool = task.fewshot_docs()
            for doc in pool if pool is not None else []:
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _functions(value: object) -> Iterator[Callable[..., object]]:
    """Yield the functions in a configuration: its own, and those of metrics, filters and examples."""
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _functions(item)
    elif callable(value):
        yield value


def _beyond(function: Callable[..., object]) -> object:
    """Return what decides a function beside its own text, or None: a partial's arguments, the file of a user's."""
    inner = inspect.unwrap(function)
    if isinstance(inner, functools.partial):
        return _sourced(inner)
    try:
        file = Path(inspect.getsourcefile(inner) or "").resolve()
        # versions and `code` cover these; an environment may be reached through links
        known = [p.resolve() for p in (Path(lm_eval.__file__).parent, Path(__file__).parents[1], tasks_dir())]
        return None if any(map(file.is_relative_to, known)) else source_hash(file.read_bytes().decode())
    except (OSError, TypeError):  # it has no file, or is not written in Python
        return None


def _sourced(value: object) -> object:
    """Replace functions by hashes of their source, since addresses differ between processes."""
    if isinstance(value, dict):
        return {str(k): _sourced(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sourced(v) for v in value]
    if callable(value):
        if isinstance(inner := inspect.unwrap(value), functools.partial):
            return _sourced([inner.func, inner.args, inner.keywords])
        try:
            return source_hash(inspect.getsource(inner))
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value
