"""The text that methods calibrate on, as `--calibration` names it: a file, or the train split of a data set."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from dart_eval.evaluation.local_data import rows_of
from dart_eval.evaluation.tasks import leaves
from dart_eval.evaluation.unsafe import block_local_code
from dart_eval.models.loading import work_offline_if_unreachable
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.util.errors import UserError, naming, summary
from dart_eval.util.files import read_text
from dart_eval.util.text import Json

MOST = 4_000_000  # characters of a data set, from its beginning
REMEDY = "give a text file or a data set, see docs/data.md"


@dataclass(frozen=True)
class CalibrationText:
    """A text, and its data set, if known.

    Attributes:
        digest: sha256 of a file's bytes, or of the text of a data set.
    """

    text: str
    digest: str
    data_set: str | None = None


def calibration_text(name: str | None, data_dir: str | None = None) -> CalibrationText:
    """Return the calibration text of that name.

    Args:
        name: a file, or a data set as NAME or NAME:CONFIGURATION; None: the project's own text.
        data_dir: folder of local data, which replaces the hub.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    path = Path(name or DEFAULT_TEXT)
    if not path.is_file():
        return _of_data_set(str(name), data_dir)
    text = read_text(path, "calibration text", "give a text file")
    inside = data_dir is not None and path.resolve().is_relative_to(Path(data_dir).resolve())
    folder = path.resolve().relative_to(Path(data_dir or "").resolve()).parts[0] if inside else None
    return CalibrationText(text, hashlib.sha256(path.read_bytes()).hexdigest(), folder and folder.replace("__", "/"))


@functools.lru_cache(maxsize=4)
def _of_data_set(name: str, data_dir: str | None) -> CalibrationText:
    """Return the first text field of a data set's train split, up to `MOST` characters."""
    data_set, _, configuration = name.partition(":")
    what = f"calibration {data_set}"
    rows: Iterable[Json]
    if data_dir is not None:
        file = Path(data_dir) / data_set.replace("/", "__") / (configuration or "default") / "train.jsonl"
        if not file.is_file():
            place = file.relative_to(data_dir)
            raise UserError(f"{what} is neither a file nor a data set of {data_dir} (looked for {place})", REMEDY)
        with naming("calibration: "):
            rows = rows_of(file)
    else:
        work_offline_if_unreachable()
        try:
            with block_local_code(what, False):
                rows = datasets.load_dataset(data_set, configuration or None, split="train")
        except UserError as error:
            raise UserError(error.problem, "start dart-eval in another folder, or give the full path") from None
        except Exception as error:  # each library has errors of its own
            words = summary(error)[:200]
            raise UserError(f"{what} is neither a file nor a data set that can be loaded ({words})", REMEDY) from None
    texts: list[str] = []
    length, field = 0, None
    for row in rows:
        field = field or next((key for key, value in row.items() if isinstance(value, str)), None)
        if field is None:
            raise UserError(f"{what} has no text field", "give another data set, or a text file")
        if (text := str(row[field] or "")).strip():
            texts.append(text)
            length += len(text)
        if length > MOST:
            break
    joined = "\n\n".join(texts)
    return CalibrationText(joined, hashlib.sha256(joined.encode()).hexdigest(), data_set)


def sharing(items: list[Task | Group], data_set: str) -> list[str]:
    """Return the tasks with documents of the data set, or of one with nearly its name."""
    return [task.task_name for task in leaves(items) if any(_alike(data_set, name) for name in _sources(task))]


def _sources(task: Task) -> list[str]:
    """Return the hub names of a task's data sets."""
    config = getattr(task, "config", None)
    files = ((getattr(config, "dataset_kwargs", None) or {}).get("data_files")) or {}
    local = [Path(f).parent.parent.name.replace("__", "/") for f in files.values()] if isinstance(files, dict) else []
    return local or [str(getattr(config, "dataset_path", None) or "")]


def _alike(one: str, other: str) -> bool:
    """Whether names mean one text: `wikitext`, `Salesforce/wikitext`, `EleutherAI/wikitext_document_level`."""
    short, long = sorted((name.rpartition("/")[2].lower() for name in (one, other)), key=len)
    return bool(short) and (short == long or long.startswith((f"{short}_", f"{short}-")))
