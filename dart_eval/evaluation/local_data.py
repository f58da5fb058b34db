"""Local data in place of the hub's, and documents that cannot be asked."""

from __future__ import annotations

from pathlib import Path

from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator_utils import get_sample_size

from dart_eval.util.errors import UserError, summary
from dart_eval.util.text import Json


def redirect(config: Json, data_dir: Path) -> Path:
    """Point a task's configuration at `<data_dir>/<hub name with __>/<configuration or default>/<split>.jsonl`.

    Returns:
        The folder of the files.

    Raises:
        UserError: a file or a split is missing.
    """
    name, remedy = config.get("task", "?"), "or leave --data-dir out to load from the hub"
    folder = data_dir / str(config["dataset_path"]).replace("/", "__") / str(config.get("dataset_name") or "default")
    files = {f.stem: str(f.resolve()) for f in sorted(folder.glob("*.jsonl")) if f.is_file()}
    evaluated = "test_split" if config.get("test_split") else "validation_split"  # as in lm-eval
    wanted = {config.get(key) for key in ("training_split", "fewshot_split", evaluated)}
    if not files:
        place = folder.relative_to(data_dir)
        raise UserError(
            f"task {name} has no data in {data_dir} (looked for {place}/*.jsonl)", f"add the files, {remedy}"
        )
    if missing := sorted({split for split in wanted if isinstance(split, str)} - files.keys()):
        problem = f"task {name} needs the split {', '.join(missing)}, and {folder} has only {', '.join(files)}"
        raise UserError(problem, f"add the missing .jsonl file, {remedy}")
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": files}
    return folder


def number_asked(task: Task, limit: float | None) -> int:
    """Return the number of a task's documents that are asked. limit: lm-eval's, a number or, below 1, a share."""
    docs = len(task.eval_docs)
    return docs if limit is None else min(docs, get_sample_size(task, limit))


def check_documents(task: Task, limit: float | None) -> None:
    """Refuse a task without documents, and documents that cannot be asked or lack the right answer among their choices.

    Raises:
        UserError: names the document by its number, from 0.
    """
    docs = task.eval_docs
    if not len(docs):
        raise UserError(f"task {task.task_name} has no documents", "add documents to its evaluated split")
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask):
        return
    for number in range(number_asked(task, limit)):
        try:
            fault = _fault(task, docs[number])
        except (ImportError, UserError):
            raise
        except Exception as error:  # of a template, or of the task's own code
            fault = f"cannot be asked ({summary(error)})"
        if fault:
            raise UserError(f"document {number} of task {task.task_name} {fault}", "fix or remove it")


def _fault(task: ConfigurableTask, doc: Json) -> str | None:
    """Return what is wrong with a document of a multiple-choice task, or None."""
    if callable(task.config.process_results):  # code of its own scores them
        return None
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if not choices:
        return "has no choices"
    if gold == []:
        return "has no right answer"
    several = isinstance(gold, list)
    for one in gold if several else [gold]:
        at: object = choices.index(one) if one in choices and not several else one  # lm-eval takes texts alone
        if not isinstance(at, int) or not 0 <= at < len(choices):
            return f"has the right answer {str(one)[:60]!r}, and {len(choices)} choices (the first is 0)"
    return None
