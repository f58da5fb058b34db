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
    most = int(limit) if limit is not None and limit >= 1 else None

    @functools.wraps(make)
    def custom_dataset(**kwargs: object) -> object:
        inside: dict[str, object] = {} if most is None else _fewer(make.__globals__, most)
        if "get_tokenizer" in make.__globals__:
            if tokenizer is None:
                raise UserError(f"task {name} makes documents for a model's tokenizer", "run it with a model")
            inside["get_tokenizer"] = lambda *_, **__: tokenizer()
        if data_dir is not None and "download_json" in make.__globals__:
            inside["download_json"] = functools.partial(_local_json, name, data_dir)
        with patch.dict(make.__globals__, inside), _from_the_seed(), _silently(), _local(name, data_dir):
            return make(**kwargs)

    return custom_dataset


def _fewer(module: dict[str, object], most: int) -> dict[str, object]:
    """Return a module's functions of `num_samples` documents, limited to `most` documents."""
    limited: dict[str, object] = {}
    for name, function in module.items():
        if not inspect.isfunction(function) or "num_samples" not in (of := inspect.signature(function)).parameters:
            continue

        @functools.wraps(function)
        def fewer(*args: object, _stock: Make = function, _of: inspect.Signature = of, **kwargs: object) -> object:
            bound = _of.bind(*args, **kwargs)
            bound.apply_defaults()
            bound.arguments["num_samples"] = min(most, bound.arguments["num_samples"])
            return _stock(*bound.args, **bound.kwargs)

        limited[name] = fewer
    return limited


def prepared_once(stock: Make) -> Make:
    """Return a task's function that prepares documents, which prepares each data set once.

    lm-eval prepares them anew at each look, and some tasks (gpqa) shuffle answers while doing so: dense and pruned
    cells would see different orders, and a document would not be found among the examples to be left out of them.
    """
    done: dict[int, tuple[object, object]] = {}

    @functools.wraps(stock)
    def process_docs(dataset: object) -> object:
        if id(dataset) not in done:
            with prepared_alike(stock):
                done[id(dataset)] = dataset, stock(dataset)  # the dataset is kept, so that its id stays its own
        return done[id(dataset)][1]

    return process_docs


@contextlib.contextmanager
def prepared_alike(stock: Make) -> Iterator[None]:
    """Let a function that draws from the global generators prepare the same documents in every process inside.

    Without this they would be those of whichever process has filled Hugging Face's cache.
    """
    modules = (v.__name__ for v in getattr(stock, "__globals__", {}).values() if isinstance(v, types.ModuleType))
    if not {"random", "numpy", "numpy.random"} & {*modules}:
        yield
        return
    cached = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        with _from_the_seed():
            yield
    finally:
        if cached:
            datasets.enable_caching()


@contextlib.contextmanager
def _from_the_seed() -> Iterator[None]:
    """Seed the global generators with `SEED` inside, and restore them afterwards."""
    before, numpys = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Hide bars and lines inside, since a run has its own view."""
    stock = tqdm.std.tqdm.__init__
    silent = patch.object(tqdm.std.tqdm, "__init__", functools.partialmethod(stock, disable=True))
    with silent, contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _local(name: str, data_dir: Path | None) -> Iterator[None]:
    """Let `datasets.load_dataset` read `<data_dir>/<hub name with __>/default/<split>.jsonl` inside."""
    if data_dir is None:
        yield
        return

    def load(path: str, *_: object, split: str = "train", **__: object) -> object:
        file = data_dir / path.replace("/", "__") / "default" / f"{split}.jsonl"
        if not file.is_file():
            raise UserError(
                f"task {name} has no data in {data_dir} (looked for {file.relative_to(data_dir)})",
                "add the file, or leave --data-dir out to load from the hub",
            )
        return stock("json", data_files={split: str(file)}, split=split)

    stock = datasets.load_dataset
    with patch.object(datasets, "load_dataset", load):
        yield


def _local_json(name: str, data_dir: Path, url: str) -> object:
    """Read the JSON at `url` from the file of its name in the folder of local data."""
    file = data_dir / url.rpartition("/")[2]
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"task {name} cannot read {file} ({type(error).__name__})", f"put {url} there, or leave --data-dir out"
        ) from None


def without_other_lengths(task: Task) -> None:
    """Let RULER's tasks report only the lengths that they were made for; for all others they report -1."""
    stock = task.process_results

    def process_results(_self: Task, doc: Json, results: list[object]) -> Json:
        return {name: value for name, value in stock(doc, results).items() if not name.isdigit() or value != -1}

    task.process_results = types.MethodType(process_results, task)
