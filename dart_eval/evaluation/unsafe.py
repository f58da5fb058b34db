"""Guards against code and data of the working directory, and against code that the model writes, unless confirmed.

`evaluate.load("code_eval")` runs ./code_eval/code_eval.py if it exists, and `load_dataset("a/b")` takes the folder
./a/b for the hub's. Both are refused by name, whoever calls them.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.tasks import _yaml_loader

from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

LOADERS = (  # those of `datasets` differ between its releases 3 and 4
    ("evaluate.loading", "LocalEvaluationModuleFactory"),
    ("datasets.load", "LocalDatasetModuleFactory"),
    ("datasets.load", "LocalDatasetModuleFactoryWithScript"),
    ("datasets.load", "LocalDatasetModuleFactoryWithoutScript"),
)


def read_safely(name: str, path: Path, trusted: Sequence[Path]) -> Json:
    """Return the settings in a task's file and those that it includes, functions by name; none of their code runs.

    Args:
        name: of the task, for messages.
        trusted: folders whose code may run later.

    Raises:
        UserError: a file elsewhere names a function, or a metric or a data set's script that is not lm-eval's.
    """

    def refuse(what: str) -> None:
        raise UserError(f"task {name} would run {what} ({path})", "add --confirm-run-unsafe-code if you trust the file")

    def constructor(folder: Path, _resolve: bool) -> Callable[[Any, Any], str]:
        def construct(_loader: object, node: Any) -> str:
            if not _is_in(folder, trusted):
                refuse(f"the function {node.value}")
            return str(node.value)

        return construct

    with patch.object(_yaml_loader, "_mk_function_ctor", constructor):
        settings = _yaml_loader.load_yaml(path, resolve_func=False)
    if not _is_in(path, trusted):
        for what in _code(settings):
            refuse(what)
    return settings


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


def _code(value: object) -> Iterator[str]:
    """Yield what would run code among settings, beside functions."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _code(item)
    if isinstance(value, dict):
        metric = value.get("metric")
        if isinstance(metric, str) and ("/" in metric or os.sep in metric):
            yield f"the metric {metric}"
        if value.get("dataset_path") == "pandas":
            yield "what its pickled data say"
        if value.get("trust_remote_code"):
            yield "a data set's script"


def sandbox_templates() -> None:
    """Let lm-eval fill in prompts in a sandbox, where a template reaches only its document."""
    stock = lm_eval.utils.env
    if not isinstance(stock, ImmutableSandboxedEnvironment):
        safe = ImmutableSandboxedEnvironment(
            loader=stock.loader, undefined=stock.undefined, keep_trailing_newline=stock.keep_trailing_newline
        )
        safe.filters.update(stock.filters)
        lm_eval.utils.env = safe


@contextmanager
def block_local_code(name: str, confirmed: bool) -> Iterator[None]:
    """Refuse metrics and data sets of the working directory while the block runs.

    Args:
        name: of what loads them, for messages (`task NAME`).
        confirmed: allow them, and let generated code run.

    Raises:
        UserError: a metric or data set of the working directory would be loaded.
    """
    if confirmed:
        with patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}):
            yield
        return
    stock, guarded = builtins.__import__, set()

    def refusing(stock_init: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: object, path: str, *args: object, **kwargs: object) -> None:
            if not os.path.isabs(path):
                remedy = "start dart-eval in another folder, or give --confirm-run-unsafe-code"
                raise UserError(f"{name} would load ./{path} of the working directory", remedy)
            stock_init(self, path, *args, **kwargs)

        return __init__

    def guard() -> None:
        for loader in LOADERS:
            kind = getattr(sys.modules.get(loader[0]), loader[1], None)
            if kind is not None and loader not in guarded:
                guarded.add(loader)
                stack.enter_context(patch.object(kind, "__init__", refusing(kind.__init__)))

    def importing(*args: object, **kwargs: object) -> object:
        module = stock(*args, **kwargs)  # type: ignore[arg-type]
        guard()
        return module

    with ExitStack() as stack:
        stack.enter_context(patch.object(builtins, "__import__", importing))  # `evaluate` takes seconds: few need it
        guard()
        yield
