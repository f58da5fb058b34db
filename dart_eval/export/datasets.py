"""The data sets on the hub behind the documents of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dart_eval.evaluation.task_names import config_of
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

DEFAULT = "default"  # the task within a benchmark with only one
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NO_HUB = ("json", "csv", "parquet", "arrow", "text")  # loaders of local files


@dataclass(frozen=True)
class Dataset:
    """A data set on the hub.

    Attributes:
        id: its name there, such as `cais/mmlu`.
        task: the task within it, as a benchmark calls it; by default lm-eval's configuration of the data set.
        split: the part behind the documents, if it is known.
    """

    id: str
    task: str = DEFAULT
    split: str | None = None


def parsed(texts: Iterable[str]) -> dict[str, Dataset]:
    """Return the data sets of `--dataset`: task -> data set.

    Raises:
        UserError: a value is not TASK=ID or TASK=ID:TASK_ID.
    """
    found = {}
    for text in texts:
        name, _, rest = text.partition("=")
        id_, colon, task = rest.partition(":")
        if not name or not HUB_ID.fullmatch(id_) or bool(colon) != bool(task):
            raise UserError(
                f"--dataset {text!r} names no data set", "for example --dataset arc_easy=allenai/ai2_arc:ARC-Easy"
            )
        found[name] = Dataset(id_, task or DEFAULT)
    return found


def datasets_of(names: Iterable[str], named: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return the data sets of lm-eval tasks, as their YAML files name them.

    Args:
        names: lm-eval tasks.
        named: the data sets of `--dataset`, which take precedence.

    Returns:
        Those that are known, and all that the user said; not those of tasks on local files, or that this lm-eval does
        not know.
    """
    found = {name: _dataset(config_of(name)) for name in dict.fromkeys(names) if name not in named}
    return {**{name: dataset for name, dataset in found.items() if dataset is not None}, **named}


def of_task(task: str, leaves: Iterable[str], datasets: Mapping[str, Dataset]) -> Dataset | None:
    """Return the data set of a task or group: its own, or the one that all its members share."""
    if task in datasets:
        return datasets[task]
    members = {datasets.get(leaf) for leaf in leaves}
    ids = {m.id if m else None for m in members}
    if len(members) == 1:
        return members.pop()
    only = ids.pop() if len(ids) == 1 else None
    return Dataset(only) if only else None


def _dataset(config: Json) -> Dataset | None:
    """Return the data set of a task's YAML, if it is on the hub."""
    path, name = config.get("dataset_path"), config.get("dataset_name")
    if not isinstance(path, str) or path in NO_HUB or not HUB_ID.fullmatch(path):
        return None
    split = config.get("test_split") or config.get("validation_split")  # as lm-eval chooses
    return Dataset(path, name if isinstance(name, str) else DEFAULT, split if isinstance(split, str) else None)
