"""Names of tasks: this project's own, and those of lm-eval's `TaskManager`.

lm-eval parses its 14,000 YAML files in every process, which takes 15 seconds. Its index is therefore written to the
cache, and read from there as long as these files stay as they are; then lm-eval itself is not even imported.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import cache_dir, write_atomically
from dart_eval.util.text import Json

# What a user types -> lm-eval tasks. Every other lm-eval task, group or tag goes by its own name.
ALIASES: dict[str, tuple[str, ...]] = {
    "arc": ("arc_easy", "arc_challenge"),
    "drift": ("drift_smoke", "drift_smoke_same"),
    "longbench_subset": (
        "longbench_qasper", "longbench_hotpotqa", "longbench_gov_report", "longbench_trec",
        "longbench_passage_retrieval_en", "longbench_lcc",
    ),
    "gpqa": ("gpqa_extended_n_shot",),  # has all questions of the other two sets
    "smoke": ("smoke_questions", "smoke_stories", "smoke_summary", "smoke_highlights", "smoke_drift"),
    "summaries": ("cnn_dailymail", "xsum", "multi_news", "gov_report"),
}  # fmt: skip

NAME = re.compile(r"^(?:task|group): *([\w-]+)$", re.MULTILINE)  # in a file of this project
Found = tuple[str, "str | None", list[str]]  # lm-eval's kind of a name, its file in lm-eval's folder, its tags or tasks


def tasks_dir() -> Path:
    """Return the folder of the project's task YAMLs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "tasks"
    return inside if inside.is_dir() else package.parent / "tasks"


def names(folders: Sequence[str] = ()) -> set[str]:
    """Return every task, group and tag: this project's, lm-eval's, and those of more folders (`--include-path`)."""
    return {*own(), *lm_evals(), *_names_in(tuple(folders))}


def aliases(folders: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return `ALIASES` without those that name a task of these folders (of `--include-path`)."""
    taken = _names_in(tuple(folders))
    return {name: tasks for name, tasks in ALIASES.items() if name not in taken}


@functools.cache
def own() -> dict[str, Path]:
    """Return the project's own tasks and groups, each with its YAML file."""
    files = [file for file in tasks_dir().rglob("*.yaml") if not file.name.startswith("_")]
    return {name: file for file in files for name in NAME.findall(file.read_text(encoding="utf-8"))}


def config_of(name: str) -> Json:
    """Return the settings of one of the project's own tasks, functions as texts."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(own()[name], resolve_func=False)


def lm_evals_dir() -> Path:
    """Return the folder of lm-eval's tasks."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tasks"


@functools.cache
def lm_evals() -> dict[str, Found]:
    """Return lm-eval's tasks, groups and tags."""
    folder = lm_evals_dir()
    state = _state(str(folder))
    file = cache_dir() / f"tasks-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    try:
        cached = json.loads(file.read_bytes())
        if cached["state"] == state:
            return {name: (kind, path, tags) for name, (kind, path, tags) in cached["index"].items()}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet, or a damaged one
    from lm_eval.tasks import TaskManager

    index: dict[str, Found] = {
        str(name): (entry.kind.name, entry.yaml_path and os.path.relpath(entry.yaml_path, folder), sorted(entry.tags))
        for name, entry in TaskManager().task_index.items()
    }
    with contextlib.suppress(OSError):  # the next process parses them again
        write_atomically(file, json.dumps({"state": state, "index": index}))
    return index


def _state(folder: str) -> str:
    """Return a digest of the names, sizes and times of the files in a folder."""
    places = ((place, files) for place, _, files in os.walk(folder) if os.path.basename(place) != "__pycache__")
    paths = sorted(os.path.join(place, name) for place, files in places for name in files)
    about = [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(about).encode()).hexdigest()


@functools.cache  # a process sees the files of its first look
def _names_in(folders: tuple[str, ...]) -> frozenset[str]:
    """Return the names of tasks, groups and tags in folders of a user."""
    if not folders:
        return frozenset()
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=[*folders], include_defaults=False).task_index)


def expand(asked: Iterable[str], folders: Sequence[str] = ()) -> list[str]:
    """Return tasks by lm-eval's names: aliases replaced and patterns matched, in order, each once.

    lm-eval's own thousands are looked up only for a name that is neither an alias nor a task of this project.

    Args:
        asked: as a user types them, `mmlu_*` for all that match.
        folders: of `--include-path`.

    Raises:
        UserError: there is none, or one is unknown: with the nearest names.
    """
    expanded: dict[str, None] = {}
    short, near = aliases(folders), {*own(), *_names_in(tuple(folders))}
    for name in asked:
        tasks = short.get(name, (name,) if name in near else ())
        if not tasks and not (tasks := tuple(fnmatch.filter(sorted(names(folders)), name))):
            listed = "`dart-eval ls tasks` lists them"
            raise UserError(f"unknown task {name!r}", nearest(name, {*names(folders), *short}) or listed)
        expanded |= dict.fromkeys(tasks)
    if not expanded:
        remedy = "for example --tasks smoke (no network needed); `dart-eval ls tasks` lists them"
        raise UserError("no task given", remedy)
    return list(expanded)
