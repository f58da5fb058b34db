"""Names of tasks: this project's own, and those of lm-eval's YAML files.

lm-eval is not imported, as that takes seconds. This module parses its YAML files itself, so an unknown
name is refused within a second. A test compares the names with lm-eval's own index.
"""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from dart_eval.evaluation import task_needs
from dart_eval.util.errors import UserError, nearest
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

PASSED_OVER = ("__pycache__", ".ipynb_checkpoints")  # folders, as in lm-eval's index
KEYS = ("task", "group", "tag", "class", "include")


def tasks_dir() -> Path:
    """Return the folder of the project's task YAMLs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "tasks"
    return inside if inside.is_dir() else package.parent / "tasks"


def names(folders: Sequence[str] = ()) -> set[str]:
    """Return every task, group and tag: this project's, lm-eval's, and those of more folders.

    Args:
        folders: of `--include-path`.
    """
    return {*own(), *lm_evals(), *(name for folder in folders for name in _named_in(Path(folder)))}


def aliases(folders: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return `ALIASES` without those that name a task of these folders (of `--include-path`)."""
    taken = {name for folder in folders for name in _named_in(Path(folder))}
    return {name: tasks for name, tasks in ALIASES.items() if name not in taken}


def own() -> dict[str, str]:
    """Return the project's own tasks, each with the path of its YAML file."""
    return _named_in(tasks_dir())


def lm_evals() -> dict[str, str]:
    """Return lm-eval's tasks, groups and tags, each with the path of a YAML file (for a tag, of one task)."""
    spec = find_spec("lm_eval")
    places = (spec.submodule_search_locations if spec else None) or []
    return {name: path for place in places for name, path in _named_in(Path(place) / "tasks").items()}


def config_of(name: str) -> dict[str, object]:
    """Return a task's YAML settings with included files; this project's tasks come before lm-eval's.

    The result is empty for an unknown name or a file that cannot be read.
    """
    path = own().get(name) or lm_evals().get(name)
    try:
        return _with_included(path) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}


def check_names(asked: Iterable[str], folders: Sequence[str] = (), needs: bool = True) -> None:
    """Refuse unknown names of tasks.

    Args:
        asked: as a user types them.
        folders: of `--include-path`.
        needs: whether to refuse tasks whose packages are missing, too.

    Raises:
        UserError: names the nearest names, or a missing package of a task.
    """
    wanted = [*asked]
    if not wanted:
        raise none_given()
    short = aliases(folders)
    if not {*wanted} <= {*short, *own()}:
        known = {*names(folders), *short}
        for name in wanted:
            if name not in known and not (is_pattern(name) and fnmatch.filter(known, name)):
                raise unknown(name, known)
    for name in wanted if needs else ():
        if path := own().get(name) or (lm_evals().get(name) if name not in short else None):
            task_needs.check_needs(name, path)


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


@functools.cache  # a process sees the files of its first look
def _named_in(folder: Path) -> dict[str, str]:
    """Return every name in a folder's YAML files with the path of a file; a task's own file comes first."""
    tasks: dict[str, str] = {}
    tagged: dict[str, str] = {}
    for path in _yaml_files(str(folder)):
        try:
            name, *tags = _names_of(path) or [""]
        except (OSError, ValueError, RecursionError):  # lm-eval skips unreadable files, too
            continue
        tasks |= {name: path} if name else {}
        tagged |= dict.fromkeys(tags, path)
    return {**tagged, **tasks}


def _yaml_files(folder: str) -> Iterator[str]:
    """Yield the paths of the YAML files in a folder and below it, as far as this user may read it."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in PASSED_OVER]
        yield from (os.path.join(place, name) for name in files if name.endswith(".yaml"))


def _names_of(path: str) -> list[str]:
    """Return the names in a file: a group, or a task and its tags."""
    header = _header(path)
    if "group" in header and "class" not in header:
        return [text for text in [header["group"]] if isinstance(text, str)]
    task, tags = header.get("task"), header.get("tag") or []
    if not isinstance(task, str):
        return []
    return [task, *([tags] if isinstance(tags, str) else (t for t in tags if isinstance(t, str)))]


@functools.cache  # many files include one
def _header(path: str) -> Json:
    """Return the values of the keys in `KEYS`, those of included files too."""
    with open(path, "rb") as file:
        text = file.read()
    found: dict[str, object] = {key: value for key, value in _parsed(text).items() if key in KEYS}
    if "group" in found and "class" not in found:
        found.pop("task", None)  # its members
    return _on_included(path, found, _header)


def _on_included(path: str, own: Json, read: Callable[[str], dict[str, object]]) -> dict[str, object]:
    """Return a file's settings on top of those of the files that it includes."""
    include = own.pop("include", [])
    base: dict[str, object] = {}
    for name in [include] if isinstance(include, str) else include:
        base |= read(os.path.join(os.path.dirname(path), name))
    return {**base, **own}


def _with_included(path: str) -> dict[str, object]:
    """Return all settings of a file and of those that it includes."""
    return _on_included(path, _parsed(Path(path).read_bytes()), _with_included)


def _parsed(text: bytes) -> dict[str, object]:
    """Parse all keys and values as YAML; functions stay texts."""
    import yaml

    try:
        loaded = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return loaded if isinstance(loaded, dict) else {}


@functools.cache
def _loader() -> type:
    """Return PyYAML's safe loader in C, to which lm-eval's functions are texts."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return Loader
