"""Hashes of the code and the task that make a cell's numbers. They change with what code does, not with its layout.

Those of code are taken over Python's tokens. Comments, docstrings, blank lines, the width of indentations and where a
line inside brackets breaks do not count. All else does: names, numbers, operators, texts (f-strings too), and what
belongs to which block. So does a trailing comma that a formatter adds, which changes a tuple elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from token import tok_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from dart_eval.evaluation.evaluate import EvalSettings

PACKAGE = Path(__file__).parent
# Files and folders that `dart-eval run` executes and that have a say in a number. Left out is what hands on what it was
# given (plan, jobs, files, journal, record), what refuses (errors, finite, checkpoint), and what finds or converts a
# model, whose weights are hashed themselves. A test holds this against what a run executes.
NUMERIC_CODE = (
    "acts.py", "adapters.py", "allocation.py", "bits.py", "codes.py", "cost.py", "expert_forms.py", "expert_pool.py",
    "experts.py", "families.py", "ffn.py", "gguf.py", "gguf_codes.py", "grids.py", "k_quants.py", "models.py",
    "quantised.py", "rounding.py", "stored.py", "trial.py", "pruning", "evaluation", "executors/worker.py",
)  # fmt: skip
# Ways to decode faster with the same masks: `run` always multiplies by masks (`"execution": "masked"` in `plan.plan`).
NOT_RUN = (
    "pruning/permuted.py", "pruning/slices.py", "pruning/inplace.py", "pruning/gather.py", "pruning/kernels.py",
    "pruning/image_kernels.py", "pruning/previewed.py", "pruning/products.py",
)  # fmt: skip
SILENT = ("ENCODING", "COMMENT", "NL", "ENDMARKER")  # tokens that say nothing
PLAIN_TEXT = re.compile(r"[rRuU]?['\"]")  # begins a text that may be a docstring: not bytes, no f-string


@functools.cache  # a process runs the code that it has loaded, whatever becomes of the files
def code_hash(tasks: Path) -> str:
    """`hash_of` this package, read once a process.

    Args:
        tasks: the folder of the project's own tasks.
    """
    return hash_of(PACKAGE, tasks)


def hash_of(package: Path, tasks: Path) -> str:
    """sha256 over names and tokens of the numeric code.

    Args:
        package: the folder in which `NUMERIC_CODE` lies.
        tasks: the folder of tasks. Their YAML files count as they are.
    """
    digest = hashlib.sha256()
    for file in numeric_files(package):
        digest.update(f"{file.relative_to(package).as_posix()} {source_hash(_text(file))}\n".encode())
    for file in sorted(f for f in tasks.rglob("*") if f.suffix in (".py", ".yaml")):
        said = source_hash(_text(file)) if file.suffix == ".py" else hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"tasks/{file.relative_to(tasks).as_posix()} {said}\n".encode())
    return digest.hexdigest()


def numeric_files(package: Path) -> list[Path]:
    """The files of `NUMERIC_CODE` that `run` executes, sorted.

    Args:
        package: the folder in which they lie.
    """
    found = {f for part in NUMERIC_CODE for f in [package / part, *(package / part).rglob("*.py")] if f.is_file()}
    return sorted(found - {package / name for name in NOT_RUN})


def task_hash(items: Sequence[Task | Group], settings: EvalSettings) -> str:
    """sha256 over a task's configuration and the documents it will be asked with (few-shot pool included)."""
    from dart_eval.evaluation.local_data import number_asked
    from dart_eval.evaluation.tasks import leaves

    digest = hashlib.sha256()
    for task in sorted(leaves(list(items)), key=lambda t: t.task_name):
        config = task.dump_config() if hasattr(task, "dump_config") else {}
        config.pop("dataset_kwargs", None)  # paths of this machine; the documents themselves are hashed below
        (config.get("metadata") or {}).pop("config_source", None)
        digest.update(json.dumps(_sourced(config), sort_keys=True, default=str).encode())
        for script in getattr(task, "own_metrics", ()):
            digest.update(script.read_bytes())
        docs = task.eval_docs
        for i in range(number_asked(task, settings.limit)):
            digest.update(json.dumps(docs[i], sort_keys=True, default=str).encode())
        if settings.num_fewshot or config.get("num_fewshot"):
            pool = task.fewshot_docs()
            for doc in pool if pool is not None else []:
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def source_hash(source: str) -> str:
    """sha256 over the tokens of Python source; over the text where that is none, such as half a call around a lambda.

    Args:
        source: of a module or a part of one, such as a method with its indentation.
    """
    try:
        said = "\0".join(_said(source))
    except (tokenize.TokenError, SyntaxError):
        said = source
    return hashlib.sha256(said.encode()).hexdigest()


def _sourced(value: Any) -> Any:
    """Functions replaced by hashes of their source: it tells them apart, addresses would differ in every process."""
    if isinstance(value, dict):
        return {str(k): _sourced(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sourced(v) for v in value]
    if callable(value):
        try:
            return source_hash(inspect.getsource(inspect.unwrap(value)))
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value


def _said(source: str) -> list[str]:
    """Tokens without comments, docstrings and what only wraps a line; a block's begin and end by their names."""
    kept: list[str] = []
    statement: list[str] = []
    defines, first = False, True  # the last statement begins a class or function; this is the first one of a body
    for kind, text in _tokens(source):
        if kind in ("INDENT", "DEDENT"):
            kept.append(kind)
            first = defines and kind == "INDENT"
        elif kind != "NEWLINE":
            statement.append(text)
        else:
            if not (first and all(PLAIN_TEXT.match(t) for t in statement)):
                kept += [*statement, kind]
            defines, first = _defines(statement), False
            statement = []
    return kept


def _defines(statement: list[str]) -> bool:
    return statement[:1] in (["class"], ["def"]) or statement[:2] == ["async", "def"]


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each token that says something.

    An f-string is one token. Since Python 3.12 it comes in pieces, and the hash must not move with Python's version.
    """
    lines = list(io.StringIO(source))
    open_texts, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        kind = tok_name[token.type]
        if kind == "FSTRING_START":
            begin = begin if open_texts else token.start
            open_texts += 1
        elif kind == "FSTRING_END":
            open_texts -= 1
            if not open_texts:
                yield "STRING", _between(lines, begin, token.end)
        elif not open_texts and kind not in SILENT:
            yield kind, token.string


def _between(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    found = lines[begin[0] - 1 : end[0]]
    found[-1] = found[-1][: end[1]]
    found[0] = found[0][begin[1] :]
    return "".join(found)


def _text(file: Path) -> str:
    with tokenize.open(file) as opened:
        return opened.read()
