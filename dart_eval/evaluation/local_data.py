"""What is wrong with local data: file, line and cause, where the libraries that read it only say that they failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator_utils import get_sample_size

from dart_eval.errors import UserError, summary
from dart_eval.files import read_regular, reason

WORDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}


def first_fault(files: Iterable[str], prepare: Callable[[Any], Any] | None) -> str | None:
    """The first line that cannot be a document, with its file and cause; None where all can.

    Args:
        files: JSON lines. prepare: what the task does with the rows of a file before it asks.
    """
    for file in files:
        try:
            rows = rows_of(read_regular(file))
            if prepare is not None:
                _prepared(rows, prepare)
        except OSError as error:
            return f"{file} cannot be read ({reason(error)})"
        except ValueError as error:
            return f"{file}, {error}"
    return None


def rows_of(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, its object) pairs of JSON lines.

    Raises:
        ValueError: the first line that is none, and why.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole)
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8 text (byte {line[error.start]:#04x})") from None
        except UnicodeEncodeError:
            raise ValueError(f"line {number} holds half a character (a lone surrogate)") from None
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg} at column {error.colno})") from None
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is {WORDS.get(type(row), 'null')}, not an object")
        if rows:
            _alike(row, number, *rows[0])
        rows.append((number, row))
    if not rows:
        raise ValueError("which holds no documents")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the field {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"holds {text}, which is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError("holds a number of more than 64 bits")
    return int(text)


def _alike(row: dict[str, Any], number: int, first: int, pattern: dict[str, Any]) -> None:
    """Refuse a row that lacks a field of the first, has another, or holds another kind of value in one."""
    for name in (*pattern, *row):
        if name not in row or name not in pattern:
            lacks, has = (number, first) if name not in row else (first, number)
            raise ValueError(f"line {lacks} lacks the field {name!r}, which line {has} has")
        kinds = [WORDS.get(type(value)) for value in (row[name], pattern[name])]
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"line {number} has {kinds[0]} in the field {name!r}, where line {first} has {kinds[1]}")


def _prepared(rows: list[tuple[int, dict[str, Any]]], prepare: Callable[[Any], Any]) -> None:
    """Refuse the first row that a task cannot make a document of."""

    def fails(count: int) -> Exception | None:
        try:
            list(prepare(datasets.Dataset.from_list([row for _, row in rows[:count]])))
        except Exception as error:  # the task's own code
            return error
        return None

    if fails(len(rows)) is None:
        return
    low, high = 0, len(rows)  # the first `low` rows pass, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    error = fails(high)
    raise ValueError(f"line {rows[high - 1][0]}: the task cannot use it ({summary(error) if error else 'no reason'})")


def number_asked(task: Task, limit: float | None) -> int:
    """How many of a task's documents are asked. limit: as lm-eval has it, so many or, below 1, a share of them."""
    docs = len(task.eval_docs)
    return docs if limit is None else min(docs, get_sample_size(task, limit))


def check_documents(task: Task, limit: float | None) -> None:
    """Refuse a task without documents, and documents whose right answer is none of their choices: they would count as
    wrong under every method.

    Raises:
        UserError: with the document's number, from 0.
    """
    docs = task.eval_docs
    if not len(docs):
        raise UserError(f"task {task.task_name} has no documents", "an empty split cannot be evaluated")
    for number in range(number_asked(task, limit)):
        doc = docs[number]
        if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask):
            continue
        if callable(task.config.process_results):  # it makes of them what it will
            continue
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if not choices:
            raise UserError(f"document {number} of task {task.task_name} has no choices", "mend or remove it")
        for one in gold if isinstance(gold, list) else [gold]:
            place: Any = choices.index(one) if one in choices else one
            if not isinstance(place, (int, float)) or not 0 <= place < len(choices):
                raise UserError(
                    f"the right answer of document {number} of task {task.task_name} is {str(one)[:60]!r}, and it has "
                    f"{len(choices)} choices (the first is 0)",
                    "mend or remove it",
                )
