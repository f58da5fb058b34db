"""Tasks that make their own documents (RULER): from a seed, with the model's tokenizer, from local data.

lm-eval's functions draw from the global random generators, and load a tokenizer with whatever code comes with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import tqdm.std
from lm_eval.api.task import Task

from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

SEED = 42  # RULER's own, wherever it has one
LOAD = datasets.load_dataset
Make = Callable[..., object]


def seeded(
    make: Make, name: str, tokenizer: Callable[[], object] | None, data_dir: Path | None, limit: float | None = None
) -> Make:
    """Return a task's function of documents that makes the same ones in every process.

    Args:
        make: `custom_dataset` of its configuration.
        name: of the task, for messages.
        tokenizer: returns the model's, by which documents get their length.
        data_dir: folder that replaces the hub and the web; None: `make` loads from there.
        limit: most documents to make, the first ones. None, or a share below 1: all (500 of RULER's).
    """

    @functools.wraps(make)
    def custom_dataset(**kwargs: object) -> object:
        module, load = make.__globals__, LOAD
        inside: dict[str, object] = {}
        if limit is not None and limit >= 1:
            inside |= {key: _fewer(item, int(limit)) for key, item in module.items() if inspect.isfunction(item)}
        if "get_tokenizer" in module:
            if tokenizer is None:
                raise UserError(f"task {name} makes documents for a model's tokenizer", "run it with a model")
            inside["get_tokenizer"] = lambda *_, **__: tokenizer()
        if data_dir is not None:
            load = functools.partial(_local_rows, name, data_dir)
            if "download_json" in module:
                inside["download_json"] = functools.partial(_local_json, name, data_dir)
        silent = functools.partialmethod(tqdm.std.tqdm.__init__, disable=True)  # a run has its own view
        with (
            patch.dict(module, inside), patch.object(datasets, "load_dataset", load), _from_the_seed(),
            patch.object(tqdm.std.tqdm, "__init__", silent), contextlib.redirect_stdout(io.StringIO()),
        ):  # fmt: skip
            return make(**kwargs)

    return custom_dataset


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


def _local_rows(name: str, data_dir: Path, path: str, *_: object, split: str = "train", **__: object) -> object:
    """Load `<data_dir>/<hub name with __>/default/<split>.jsonl` in place of a data set of the hub."""
    file = _local_file(name, data_dir, f"{path.replace('/', '__')}/default/{split}.jsonl")
    return LOAD("json", data_files={split: str(file)}, split=split)


def _local_json(name: str, data_dir: Path, url: str) -> object:
    """Read the JSON at `url` from the file of its name in the folder of local data."""
    file = _local_file(name, data_dir, url.rpartition("/")[2])
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"task {name} cannot read {file} ({error})", f"put {url} there") from None


def _local_file(name: str, data_dir: Path, place: str) -> Path:
    """Return a file of local data, which must be there."""
    if not (data_dir / place).is_file():
        raise UserError(
            f"task {name} has no data in {data_dir} (looked for {place})",
            "add the file, or leave --data-dir out to load it from the hub",
        )
    return data_dir / place


def without_other_lengths(task: Task) -> None:
    """Let RULER's tasks report only the lengths that they were made for; for all others they report -1."""
    stock = task.process_results

    def process_results(_self: Task, doc: Json, results: list[object]) -> Json:
        return {name: value for name, value in stock(doc, results).items() if not name.isdigit() or value != -1}

    task.process_results = types.MethodType(process_results, task)
