"""Where a task's documents come from: local data, or a seed and the model's tokenizer (RULER). Those it cannot ask.

lm-eval's functions that make documents draw from the global random generators, and load a tokenizer with whatever code
comes with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import datasets
import lm_eval.utils
import numpy as np
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator_utils import get_sample_size

from dart_eval.util.errors import UserError, summary
from dart_eval.util.quiet import muted
from dart_eval.util.text import Json

SEED = 42  # RULER's own, wherever it has one
LONGEST_WORD = 1_000_000  # letters: a tokenizer takes minutes and gigabytes for one of ten million
FILES = ("json", "csv", "parquet", "text")  # names of a task's data where they are files of a user, or ours
Make = Callable[..., object]


def redirect(config: Json, data_dir: Path) -> Path:
    """Point a task's configuration at `<data_dir>/<hub name with __>/<configuration or default>/<split>.jsonl`.

    Returns:
        The folder of the files.

    Raises:
        UserError: a file or a split is missing.
    """
    name, remedy = config.get("task", "?"), "or leave --data-dir out to load from the hub"
    folder = data_dir / str(config["dataset_path"]).replace("/", "__") / str(config.get("dataset_name") or "default")
    files = {f.stem: str(f.resolve()) for f in sorted(folder.glob("*.jsonl")) if f.is_file()}
    evaluated = "test_split" if config.get("test_split") else "validation_split"  # as in lm-eval
    wanted = {config.get(key) for key in ("training_split", "fewshot_split", evaluated)}
    if not files:
        place = folder.relative_to(data_dir)
        raise UserError(
            f"task {name} has no data in {data_dir} (looked for {place}/*.jsonl)", f"add the files, {remedy}"
        )
    if missing := sorted({split for split in wanted if isinstance(split, str)} - files.keys()):
        problem = f"task {name} needs the split {', '.join(missing)}, and {folder} has only {', '.join(files)}"
        raise UserError(problem, f"add the missing .jsonl file, {remedy}")
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": files}
    return folder


def odd_split(folder: Path) -> str | None:
    """Return what is wrong with the first file of local data that cannot be read, or is unlike the first."""
    from pyarrow import ArrowException, json, unify_schemas  # slow to import, and for an error alone

    first = None
    for file in sorted(folder.glob("*.jsonl")):
        try:
            schema = json.read_json(file).schema
            first = first or schema
            unify_schemas([first, schema], promote_options="permissive")
            odd = sorted(set(schema.names) ^ set(first.names))
        except (ArrowException, OSError, UnicodeError) as error:
            return f"{file} cannot be read as the others ({summary(error)})"
        if odd:
            return f"{file} and the first file differ in the columns {', '.join(odd)}"
    return None


def number_asked(task: Task, limit: float | None) -> int:
    """Return the number of a task's documents that are asked. limit: lm-eval's, a number or, below 1, a share."""
    docs = len(task.eval_docs)
    return docs if limit is None else min(docs, get_sample_size(task, limit))


def check_documents(task: Task, limit: float | None) -> None:
    """Refuse a task without documents, and documents that cannot be asked or lack the right answer among their choices.

    Raises:
        UserError: names the document by its number, from 0.
    """
    docs = task.eval_docs
    if not len(docs):
        raise UserError(f"task {task.task_name} has no documents", "add documents to its evaluated split")
    local = isinstance(task, ConfigurableTask) and task.config.dataset_path in FILES
    if not local and (task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask)):
        return
    for number in range(number_asked(task, limit)):
        doc: Json = {}
        try:
            with patch.object(lm_eval.utils.env, "finalize", _not_null if local else None):
                doc = docs[number]  # which may hold what is no UTF-8
                fault = _fault(task, doc, local)
        except (ImportError, UserError):
            raise
        except Exception as error:  # of a template, or of the task's own code
            fault = f"cannot be asked ({summary(error)})"
        if fault:
            nulls = ", ".join(name for name, value in doc.items() if value is None)
            null = f" (null: {nulls})" if nulls else ""
            raise UserError(f"document {number} of task {task.task_name} {fault}{null}", "fix or remove it")


def _fault(task: ConfigurableTask, doc: Json, local: bool) -> str | None:
    """Return what is wrong with a document, or None. local: nothing that a local document is asked may be null."""
    scored = task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results)  # not by its own code
    choices = task.doc_to_choice(doc) if scored else []
    if local:
        target = task.doc_to_target(doc)
        for text in (task.doc_to_text(doc), *(target if isinstance(target, list) else [target]), *choices):
            longest = max(map(len, str(_not_null(text)).split()), default=0)
            if longest > LONGEST_WORD:
                return f"has a word of {longest:,} letters, of at most {LONGEST_WORD:,}"
    if not scored:
        return None
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if not choices:
        return "has no choices"
    if gold == []:
        return "has no right answer"
    several = isinstance(gold, list)
    for one in gold if several else [gold]:
        at: object = choices.index(one) if one in choices and not several else one  # lm-eval takes texts alone
        if not isinstance(at, int) or not 0 <= at < len(choices):
            return f"has the right answer {str(one)[:60]!r}, and {len(choices)} choices (the first is 0)"
    return None


def _not_null(value: object) -> object:
    """Return what a template prints, but not null, which would be asked or scored as the word None."""
    if value is None:
        raise ValueError("a field is null")
    return value


def seeded(make: Make, name: str, tokenizer: Callable[[], object] | None, limit: float | None = None) -> Make:
    """Return a task's function of documents that makes the same ones in every process.

    Args:
        make: `custom_dataset` of its configuration.
        name: of the task, for messages.
        tokenizer: returns the model's, by which documents get their length.
        limit: most documents to make, the first ones. None, or a share below 1: all (500 of RULER's).
    """

    @functools.wraps(make)
    def custom_dataset(**kwargs: object) -> object:
        inside: dict[str, object] = {}
        if limit is not None and limit >= 1:
            functions = {key: item for key, item in make.__globals__.items() if inspect.isfunction(item)}
            inside = {key: _fewer(function, int(limit)) for key, function in functions.items()}
        if needs_tokenizer(make):
            if tokenizer is None:
                raise UserError(f"task {name} makes documents for a model's tokenizer", "run it with a model")
            inside["get_tokenizer"] = lambda *_, **__: tokenizer()
        with patch.dict(make.__globals__, inside), _from_the_seed(), muted():  # a run has its own view
            return make(**kwargs)

    return custom_dataset


def needs_tokenizer(make: Make) -> bool:
    """Whether a task's function makes documents for a model's tokenizer: RULER's, of texts from the hub and the web."""
    return "get_tokenizer" in make.__globals__


def _fewer(function: Make, most: int) -> Make:
    """Return a function that makes at most so many documents, if it takes a number of documents."""
    signature = inspect.signature(function)
    if "num_samples" not in signature.parameters:
        return function

    @functools.wraps(function)
    def fewer(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments["num_samples"] = min(most, bound.arguments["num_samples"])
        return function(*bound.args, **bound.kwargs)

    return fewer


def prepared_once(stock: Make) -> Make:
    """Return a task's function that prepares documents, which prepares each data set once, and alike everywhere.

    lm-eval prepares them anew at each look, and some tasks (gpqa) shuffle answers while doing so: dense and pruned
    cells would see different orders, and a document would not be found among the examples to be left out of them.
    """
    modules = {m.__name__ for m in getattr(stock, "__globals__", {}).values() if isinstance(m, types.ModuleType)}
    draws = bool({"random", "numpy", "numpy.random"} & modules)
    done: dict[int, tuple[object, object]] = {}

    @functools.wraps(stock)
    def process_docs(dataset: object) -> object:
        if id(dataset) not in done:
            with _from_the_seed() if draws else contextlib.nullcontext():
                done[id(dataset)] = dataset, stock(dataset)  # the dataset is kept, so that its id stays its own
        return done[id(dataset)][1]

    return process_docs


@contextlib.contextmanager
def _from_the_seed() -> Iterator[None]:
    """Seed the global generators with `SEED` inside, and restore them afterwards.

    Hugging Face's cache is off meanwhile, or documents would be those of whichever process has filled it.
    """
    before, numpys, cached = random.getstate(), np.random.get_state(), datasets.is_caching_enabled()
    random.seed(SEED)
    np.random.seed(SEED)
    datasets.disable_caching()
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)
        if cached:
            datasets.enable_caching()


def without_other_lengths(task: Task) -> None:
    """Let RULER's tasks report only the lengths that they were made for; for all others they report -1."""
    stock = task.process_results

    def process_results(_self: Task, doc: Json, results: list[object]) -> Json:
        return {name: value for name, value in stock(doc, results).items() if not name.isdigit() or value != -1}

    task.process_results = types.MethodType(process_results, task)
