"""Errors in local data by file, line and cause, as the libraries that read it only say that they failed."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator_utils import get_sample_size

from dart_eval.util.errors import UserError, summary
from dart_eval.util.files import read_regular, reason
from dart_eval.util.text import Json

WORDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}


# Functions of lm-eval that make texts of a document, and their name for it. A new task tries its first document.
ASKING = {**dict.fromkeys(("doc_to_text", "doc_to_target", "doc_to_choice"), "doc"), "__init__": "test_doc"}
PRINTED = re.compile(r"\{\{-?\s*(\w+)\s*-?\}\}")  # a field of a document in a template, as it is


def redirect(config: Json, data_dir: Path) -> list[str]:
    """Point a task's configuration at `<data_dir>/<hub name with __>/<configuration or default>/<split>.jsonl`.

    Returns:
        The files.

    Raises:
        UserError: a file or a split is missing.
    """
    name = config.get("task", "?")
    folder = data_dir / str(config["dataset_path"]).replace("/", "__") / str(config.get("dataset_name") or "default")
    files = {f.stem: str(f.resolve()) for f in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise UserError(
            f"task {name} has no data in {data_dir} (looked for {folder.relative_to(data_dir)}/*.jsonl)",
            "add the files, or leave --data-dir out to load from the hub",
        )
    wanted = [config.get(k) for k in ("training_split", "fewshot_split", "test_split")]
    if not config.get("test_split"):  # lm-eval evaluates the test split, else the validation split
        wanted.append(config.get("validation_split"))
    for file in files.values():
        if not Path(file).is_file():  # a pipe would be waited for
            raise UserError(f"task {name}: {file} is not a regular file", "give the files of the data set themselves")
    missing = sorted({w for w in wanted if isinstance(w, str)} - set(files))
    if missing:
        raise UserError(
            f"task {name} needs the split {', '.join(missing)}, and {folder} has only {', '.join(files)}",
            "add the missing .jsonl file, or leave --data-dir out to load from the hub",
        )
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": files}
    return list(files.values())


def first_fault(
    files: Iterable[str], prepare: Callable[[object], object] | None, most: int | None = None, all_fields: bool = True
) -> str | None:
    """Return the first line that cannot be a document, with its file and cause, or None.

    Args:
        files: JSON lines.
        prepare: the task's preparation of a file's rows, if any.
        most: rows of each file to check; None: all.
        all_fields: whether each row must have all fields.
    """
    for file in files:
        try:
            rows = rows_of(read_regular(file), most, all_fields)
            if prepare is not None:
                _prepared(rows, prepare)
        except OSError as error:
            return f"{file} cannot be read ({reason(error)})"
        except ValueError as error:
            return f"{file}, {error}"
    return None


def rows_of(data: bytes, most: int | None = None, all_fields: bool = True) -> list[tuple[int, dict[str, object]]]:
    """Return (line number, object) pairs of JSON lines; see `first_fault`.

    Raises:
        ValueError: names the first bad line and the reason.
    """
    rows: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(rows) == most:
            break
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
            _alike(row, number, *rows[0], all_fields)
        rows.append((number, row))
    if not rows:
        raise ValueError("which holds no documents")
    return rows


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the field {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _no_number(text: str) -> object:
    raise ValueError(f"holds {text}, which is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError("holds a number of more than 64 bits")
    return int(text)


def _alike(row: dict[str, object], number: int, first: int, pattern: dict[str, object], all_fields: bool) -> None:
    """Refuse a row with another type of value in a field than the first row, or with `all_fields` other fields."""
    for name in (*pattern, *row):
        if name not in row or name not in pattern:
            if not all_fields:
                continue
            lacks, has = (number, first) if name not in row else (first, number)
            raise ValueError(f"line {lacks} lacks the field {name!r}, which line {has} has")
        kinds = [WORDS.get(type(value)) for value in (row[name], pattern[name])]
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"line {number} has {kinds[0]} in the field {name!r}, where line {first} has {kinds[1]}")


def _prepared(rows: list[tuple[int, dict[str, object]]], prepare: Callable[[object], Any]) -> None:
    """Refuse the first row that the task's preparation fails on."""

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
    """Return the number of a task's documents that are asked. limit: lm-eval's, a number or, below 1, a share."""
    docs = len(task.eval_docs)
    return docs if limit is None else min(docs, get_sample_size(task, limit))


def check_documents(task: Task, limit: float | None, files: Sequence[str]) -> None:
    """Refuse a task without documents, and documents that cannot be asked or lack the right answer among their choices.

    Args:
        files: of local data that the documents come from; none for data of the hub.

    Raises:
        UserError: names the document by its number, from 0.
    """
    docs = task.eval_docs
    if not len(docs):
        raise UserError(f"task {task.task_name} has no documents", "add documents to its evaluated split")
    for number in range(number_asked(task, limit) if isinstance(task, ConfigurableTask) else 0):
        doc = docs[number]
        try:
            fault = _fault(task, doc, bool(files))
        except (ImportError, UserError):
            raise
        except Exception as error:  # of a template, or of the task's own code
            fault = f"cannot be asked ({summary(error)})"
        if fault:
            where = f" ({place})" if (place := place_of(files, doc)) else ""
            raise UserError(f"document {number} of task {task.task_name}{where} {fault}", "fix or remove it")


def _fault(task: ConfigurableTask, doc: dict[str, object], local: bool) -> str | None:
    """Return what is wrong with a document, or None. local: whether it is unpublished, and may lack fields."""
    if local and (null := next((name for name in _printed(task) if name in doc and doc[name] is None), None)):
        return f"has null in the field {null!r}, which would be asked as None"
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):  # code of its own scores them
        return None
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if not choices:
        return "has no choices"
    if local and any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        return "has a choice without text"
    several = isinstance(gold, list)
    if gold == []:
        return "has no right answer"
    for one in gold if several else [gold]:
        at: object = choices.index(one) if one in choices and not several else one  # lm-eval takes texts alone
        if not isinstance(at, int) or not 0 <= at < len(choices):
            return f"has the right answer {str(one)[:60]!r}, and {len(choices)} choices (the first is 0)"
    return None


def _printed(task: ConfigurableTask) -> list[str]:
    """Return the fields that the task's texts contain verbatim; a null in one would become None."""
    config = task.config
    templates = [config.doc_to_text, config.doc_to_target, config.doc_to_choice]  # a list of choices is no template
    texts = [text for text in templates if isinstance(text, str) and "{%" not in text]  # a condition passes over a null
    return [name for text in texts for name in ([text] if text.isidentifier() else PRINTED.findall(text))]


def check_shots(task: Task, num_fewshot: int | None) -> None:
    """Refuse more examples than a task has.

    Args:
        num_fewshot: examples in a prompt; None: the task's own number.

    Raises:
        UserError: names the number of examples that exist.
    """
    own, sampler = getattr(task.config, "num_fewshot", None), getattr(task, "sampler", None)
    shots = own if num_fewshot is None or own == 0 else num_fewshot  # lm-eval leaves a task's 0 as it is
    if not shots or sampler is None or not isinstance(task, ConfigurableTask):
        return
    # lm-eval draws one more where the splits are named alike, both unnamed included, and drops the document itself.
    split = task.fewshot_cfg.split
    itself = split == task.config.test_split and (split is not None or not isinstance(sampler, FirstNSampler))
    most = len(sampler.fewshot_indices or sampler.df) - itself
    if shots > most:
        raise UserError(
            f"task {task.task_name} needs {shots} few-shot examples, and has {max(most, 0)}",
            f"give --num-fewshot {max(most, 0)} or less",
        )


def place_of(files: Iterable[str], doc: Any) -> str:
    """Return the file and line of the row that a document was made of; empty if no row is like it."""
    for file in files if isinstance(doc, dict) else ():
        with contextlib.suppress(ValueError):
            for number, row in rows_of(read_regular(file), all_fields=False):
                same = row.keys() & doc.keys()
                if same and all(row[name] == doc[name] for name in same):
                    return f"{file}, line {number}"
    return ""


def asked_at(error: BaseException | None) -> object:
    """Return the document that lm-eval was making a text of when it failed, or None."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if (name := ASKING.get(frame.f_code.co_name)) in frame.f_locals:
                return frame.f_locals[name]
        error = error.__cause__
    return None
