"""Local data in place of the hub's; rows and documents that cannot be asked are refused with their file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator_utils import get_sample_size

from dart_eval.util.errors import UserError, summary
from dart_eval.util.files import read_regular, reason
from dart_eval.util.text import Json

KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}
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
    for file in files.values():
        if not Path(file).is_file():  # a pipe would be waited for
            raise UserError(f"task {name}: {file} is not a regular file", "give the files of the data set themselves")
    evaluated = "test_split" if config.get("test_split") else "validation_split"  # as in lm-eval
    wanted = {config.get(key) for key in ("training_split", "fewshot_split", evaluated)}
    if missing := sorted({split for split in wanted if isinstance(split, str)} - files.keys()):
        raise UserError(
            f"task {name} needs the split {', '.join(missing)}, and {folder} has only {', '.join(files)}",
            "add the missing .jsonl file, or leave --data-dir out to load from the hub",
        )
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": files}
    return list(files.values())


def rows_of(file: str | Path, most: int | None = None) -> list[Json]:
    """Return the rows of a file of JSON lines, each with the types of the first.

    Args:
        most: rows to read; None: all.

    Raises:
        UserError: names the file, the first bad line and the reason.
    """
    try:
        lines = read_regular(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({reason(error)})", "give another file") from None
    rows: list[Json] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or len(rows) == most:
            continue
        try:
            row = json.loads(line.decode(), object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole)
            _check_kinds(row, rows[0] if rows else {})
        except (ValueError, RecursionError) as error:
            cause = getattr(error, "msg", None) or summary(error)  # without JSON's own line, which is always 1
            raise UserError(f"{file}, line {number}: {cause}", "fix the line") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no documents", "add a line for each")
    return rows


def _once(pairs: list[tuple[str, object]]) -> Json:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a field stands twice")
    return row


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number of JSON")


def _whole(text: str) -> int:
    if not -(2**63) <= int(text) < 2**64:
        raise ValueError("a number of more than 64 bits")
    return int(text)


def _check_kinds(row: object, first: Json) -> None:
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    for name in row.keys() & first.keys():
        kinds = [KINDS.get(type(value)) for value in (row[name], first[name])]
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"the field {name!r} has {kinds[0]}, and {kinds[1]} in the first line")


def number_asked(task: Task, limit: float | None) -> int:
    """Return the number of a task's documents that are asked. limit: lm-eval's, a number or, below 1, a share."""
    docs = len(task.eval_docs)
    return docs if limit is None else min(docs, get_sample_size(task, limit))


def check_documents(task: Task, limit: float | None, file: str | None) -> None:
    """Refuse a task without documents, and documents that cannot be asked or lack the right answer among their choices.

    Args:
        file: of local data that the documents come from; None for data of the hub.

    Raises:
        UserError: names the document by its number, from 0.
    """
    docs = task.eval_docs
    if not len(docs):
        raise UserError(f"task {task.task_name} has no documents", "add documents to its evaluated split")
    for number in range(number_asked(task, limit) if isinstance(task, ConfigurableTask) else 0):
        try:
            fault = _fault(task, docs[number], file is not None)
        except (ImportError, UserError):
            raise
        except Exception as error:  # of a template, or of the task's own code
            fault = f"cannot be asked ({summary(error)})"
        if fault:
            where = f" ({file})" if file else ""
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
