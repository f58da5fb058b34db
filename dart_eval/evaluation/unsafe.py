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
from unittest.mock import patch

import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dart_eval.util.errors import UserError

LOADERS = (  # those of `datasets` differ between its releases 3 and 4
    ("evaluate.loading", "LocalEvaluationModuleFactory"),
    ("datasets.load", "LocalDatasetModuleFactory"),
    ("datasets.load", "LocalDatasetModuleFactoryWithScript"),
    ("datasets.load", "LocalDatasetModuleFactoryWithoutScript"),
)


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
    files = [path.resolve()]
    for file in files:  # which grows by what is included
        if any(file.is_relative_to(folder.resolve()) for folder in trusted):
            continue
        with file.open("rb") as stream:
            settings = yaml.load(stream, Loader=_Loader)
        if code := next(_code(settings), None):
            raise UserError(
                f"task {name} would run {code} ({file})", "add --confirm-run-unsafe-code if you trust the file"
            )
        included = settings.get("include", []) if isinstance(settings, dict) else []
        for other in [included] if isinstance(included, str) else included:
            path = (file.parent / str(other)).resolve()
            files += [path] if path not in files else []


def _code(value: object) -> Iterator[str]:
    """Yield everything in a task's file that would run code."""
    if isinstance(value, _Code):
        yield f"the function {value}"
    elif isinstance(value, list):
        for item in value:
            yield from _code(item)
    elif isinstance(value, dict):
        metric = value.get("metric")
        if isinstance(metric, str) and ("/" in metric or os.sep in metric):
            yield f"the metric {metric}"
        if value.get("dataset_path") == "pandas":
            yield "what its pickled data say"
        if value.get("trust_remote_code"):
            yield "a data set's script"
        yield from _code([*value.values()])


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

    def guard() -> None:
        for loader in LOADERS:
            kind = getattr(sys.modules.get(loader[0]), loader[1], None)
            if kind is not None and loader not in guarded:
                guarded.add(loader)
                stack.enter_context(patch.object(kind, "__init__", _refusing(kind.__init__, name)))

    def importing(*args: object, **kwargs: object) -> object:
        module = stock(*args, **kwargs)  # type: ignore[arg-type]
        guard()
        return module

    with ExitStack() as stack:
        stack.enter_context(patch.object(builtins, "__import__", importing))  # `evaluate` takes seconds: few need it
        guard()
        yield


def _refusing(stock: Callable[..., None], who: str) -> Callable[..., None]:
    """Return a loader's `__init__` that refuses the working directory."""

    def __init__(self: object, path: str, *args: object, **kwargs: object) -> None:
        if not os.path.isabs(path):
            raise UserError(
                f"{who} would load ./{path} of the working directory",
                "start dart-eval in another folder, or give --confirm-run-unsafe-code",
            )
        stock(self, path, *args, **kwargs)

    return __init__


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
