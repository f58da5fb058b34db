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

# The tasks people ask for most, for `dart-eval ls tasks`.
COMMON: dict[str, str] = {
    "hellaswag": "which ending follows (4 choices)",
    "boolq": "yes/no questions on a passage",
    "rte": "does the premise entail the hypothesis",
    "winogrande": "which of two the pronoun means",
    "openbookqa": "elementary science (4 choices)",
    "piqa": "which of two solutions works",
    "mmlu": "57 subjects (4 choices); 5-shot in the papers: --num-fewshot 5",
    "medmcqa": "medical entrance questions (4 choices); 5-shot in the papers",
    "gsm8k": "grade-school mathematics, 5 examples; gsm8k_cot_zeroshot with a chat template",
    "mmlu_pro": "14 subjects (10 choices), the answer is generated after thinking, 5 examples",
    "ifeval": "instructions that a program can check; needs the extra [tasks] and a chat template",
    "humaneval": "Python functions, run against tests: --confirm-run-unsafe-code; humaneval_instruct in a chat",
    "mbpp": "short Python programs, run against tests: --confirm-run-unsafe-code; mbpp_instruct in a chat",
    "ruler_4k": "13 tests of finding things in 4096 tokens; also ruler_8k, ruler_16k, ruler_32k; extra [tasks]",
    "longbench": "20 tasks on long texts; longbench_subset has one of each kind in English; extra [tasks]",
    "wikitext": "perplexity of WikiText-2 articles, second half of each chunk",
    "cnn_dailymail": "news highlights, ROUGE-1/2/L",
    "xsum": "one-sentence news summaries, ROUGE-1/2/L",
    "multi_news": "one-page summaries of several news passages (LongBench), ROUGE-1/2/L",
    "gov_report": "one-page summaries of US agencies' reports (LongBench), ROUGE-1/2/L",
    "smoke_questions": "shipped: 128 science and commonsense questions (4 choices)",
    "smoke_stories": "shipped: 64 story endings (4 choices)",
    "smoke_summary": "shipped: 30 articles, one-sentence summaries",
    "smoke_highlights": "shipped: 30 articles, three-sentence summaries",
    "smoke_drift": "shipped: 40 two-topic documents, perplexity after the switch",
    "drift_smoke": "shipped: perplexity of an article after another one",
    "drift_smoke_same": "shipped: its control, the second half of an article after the first",
    "drift_xsum": "the same from XSum's articles; control drift_xsum_same",
    "drift_cnn_dailymail": "the same from CNN/DailyMail's; control drift_cnn_dailymail_same",
}

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
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            about = os.stat(path := os.path.join(place, name))
            digest.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@functools.cache  # a process sees the files of its first look
def _names_in(folders: tuple[str, ...]) -> frozenset[str]:
    """Return the names of tasks, groups and tags in folders of a user."""
    if not folders:
        return frozenset()
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=[*folders], include_defaults=False).task_index)


def check_names(asked: Iterable[str], folders: Sequence[str] = ()) -> None:
    """Refuse unknown names of tasks.

    Args:
        asked: as a user types them.
        folders: of `--include-path`.

    Raises:
        UserError: names the nearest names.
    """
    if not (wanted := {*asked}):
        raise none_given()
    short = aliases(folders)
    if wanted <= {*short, *own()}:
        return
    known = {*names(folders), *short}
    for name in sorted(wanted - known):
        if not (is_pattern(name) and fnmatch.filter(known, name)):
            raise unknown(name, known)


def is_pattern(name: str) -> bool:
    """Whether a name stands for all that it matches, as `mmlu_*`."""
    return any(letter in name for letter in "*?[")


def unknown(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known ones."""
    listed = "`dart-eval ls tasks` lists them"
    return UserError(f"unknown task {name!r}", listed if name == "list" else nearest(name, known) or listed)


def none_given() -> UserError:
    """Return the error for a missing name."""
    return UserError("no task given", "for example --tasks smoke (no network needed); `dart-eval ls tasks` lists them")
