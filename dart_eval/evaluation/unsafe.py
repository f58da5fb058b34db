"""Guards against code and data of the working directory, and against code that the model writes, unless confirmed.

`evaluate.load("code_eval")` runs ./code_eval/code_eval.py if it exists, and `load_dataset("a/b")` takes the folder
./a/b for the hub's. Both are refused by name, whoever calls them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dart_eval.util.errors import UserError

REMEDY = "start dart-eval in another folder, or give --confirm-run-unsafe-code"
LOADERS = {
    "evaluate.loading": ("LocalEvaluationModuleFactory",),
    # of datasets 4, and of datasets 3
    "datasets.load": (
        "LocalDatasetModuleFactory", "LocalDatasetModuleFactoryWithScript", "LocalDatasetModuleFactoryWithoutScript",
    ),
}  # fmt: skip


def check_task(name: str, unsafe: bool, confirmed: bool) -> None:
    """Refuse a task that runs code of the model.

    Raises:
        UserError: it does, and the user has not confirmed that.
    """
    if unsafe and not confirmed:
        raise UserError(
            f"task {name} runs code that the model writes",
            "add --confirm-run-unsafe-code in a safe place, such as a container",
        )


class _Loader(yaml.SafeLoader):
    """Reads a task's file; functions become `_Code`."""


class _Code(str):
    """The name of a function."""


_Loader.add_constructor("!function", lambda loader, node: _Code(node.value))


def check_yaml(name: str, path: Path, trusted: Sequence[Path]) -> None:
    """Refuse a task of another folder whose file, or one that it includes, would run code.

    Args:
        name: of the task, for messages.
        trusted: folders whose code may run.

    Raises:
        UserError: it would run a function, a metric or a data set's script that is not lm-eval's.
    """
    files, seen = [path.resolve()], set()
    folders = [folder.resolve() for folder in trusted]
    while files:
        file = files.pop()
        if file in seen or any(file.is_relative_to(folder) for folder in folders):
            continue
        seen.add(file)
        with file.open("rb") as opened:
            loaded = yaml.load(opened, Loader=_Loader)
        if what := next(_code(loaded), None):
            raise UserError(
                f"task {name} would run {what} ({file})", "add --confirm-run-unsafe-code if you trust the file"
            )
        included = loaded.get("include", []) if isinstance(loaded, dict) else []
        for other in [included] if isinstance(included, str) else included:
            files.append((file.parent / str(other)).resolve())


def _code(value: object) -> Iterator[str]:
    """Yield everything in a task's file that would run code."""
    if isinstance(value, _Code):
        yield f"the function {value}"
    elif isinstance(value, list):
        for item in value:
            yield from _code(item)
    elif isinstance(value, dict):
        metric, data = value.get("metric"), value.get("dataset_path")
        if isinstance(metric, str) and ("/" in metric or os.sep in metric):
            yield f"the metric {metric}"
        if data == "pandas":
            yield "what its pickled data say"
        if value.get("trust_remote_code"):
            yield "a data set's script"
        for item in value.values():
            yield from _code(item)


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
        UserError: a metric or data set of the working directory would be loaded, even if the error is swallowed.
    """
    if confirmed:
        with patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}):
            yield
        return
    refused: list[UserError] = []
    with ExitStack() as stack:

        def guard(module: ModuleType) -> None:
            for loader in LOADERS[module.__name__]:
                if (stock := getattr(module, loader, None)) is not None:
                    stack.enter_context(patch.object(module, loader, _guarded(stock, name, refused)))

        for imported in LOADERS.keys() & sys.modules.keys():
            guard(sys.modules[imported])
        sys.meta_path.insert(0, watch := _Watch(guard))
        stack.callback(sys.meta_path.remove, watch)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if refused:
                raise refused[0] from error
            raise
    if refused:
        raise refused[0]


class _Watch(MetaPathFinder):
    """Hands a module of `LOADERS` to `guard` once it is imported: `evaluate` takes seconds, and few tasks need it."""

    def __init__(self, guard: Callable[[ModuleType], None]) -> None:
        self.guard = guard

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in LOADERS:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            stock = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                stock(module)
                self.guard(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - for mypy, methods are fixed
        return spec


def _guarded(stock: Any, who: str, refused: list[UserError]) -> object:
    class Guarded(stock):
        def __init__(self, path: str, *args: object, **kwargs: object) -> None:
            if not os.path.isabs(path):
                refused.append(UserError(f"{who} would load ./{path} of the working directory", REMEDY))
                raise refused[-1]
            super().__init__(path, *args, **kwargs)

    return Guarded


@contextmanager
def away_from_this_folder() -> Iterator[None]:
    """Change to the folder that this package is imported from: Ray's workers import from where Ray was started."""
    before = Path.cwd()
    os.chdir(Path(__file__).resolve().parents[2])
    try:
        yield
    finally:
        os.chdir(before)


def own_metrics() -> list[Path]:
    """Return the scripts of the working directory that `evaluate.load` would run, `NAME/NAME.py`."""
    scripts = [*Path().glob("*/*.py"), *Path().glob("*/*/*.py")]
    return sorted(f for f in scripts if f.stem == f.parent.name)
