"""Tasks that make their own documents (RULER): from a seed, with the model's tokenizer.

lm-eval's functions draw from the global random generators, and load a tokenizer with whatever code comes with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import random
import types
from collections.abc import Callable, Iterator
from unittest.mock import patch

import datasets
import numpy as np
import tqdm.std
from lm_eval.api.task import Task

from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

SEED = 42  # RULER's own, wherever it has one
Make = Callable[..., object]


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
        silent = functools.partialmethod(tqdm.std.tqdm.__init__, disable=True)  # a run has its own view
        with (
            patch.dict(make.__globals__, inside), _from_the_seed(), patch.object(tqdm.std.tqdm, "__init__", silent),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # fmt: skip
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
