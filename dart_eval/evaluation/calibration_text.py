"""The text that methods calibrate on, as `--calibration` names it: a file, or the train split of a data set."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets

from dart_eval.evaluation.unsafe import block_local_code
from dart_eval.models.loading import work_offline_if_unreachable
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.util.errors import UserError, naming, summary
from dart_eval.util.files import read_text
from dart_eval.util.text import Json

MOST = 4_000_000  # characters of a data set, from its beginning
REMEDY = "give a text file or a data set, see docs/data.md"


class CalibrationText(NamedTuple):
    """A text, and the sha256 of a file's bytes or of the text of a data set."""

    text: str
    digest: str


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
    return CalibrationText(text, hashlib.sha256(path.read_bytes()).hexdigest())


@functools.lru_cache(maxsize=4)
def _of_data_set(name: str, data_dir: str | None) -> CalibrationText:
    """Return the first text field of a data set's train split, up to `MOST` characters."""
    data_set, _, configuration = name.partition(":")
    with naming(f"calibration {data_set}: "):
        field, texts, length = None, [], 0
        for row in _rows(data_set, configuration or None, data_dir):
            field = field or next((key for key, value in row.items() if isinstance(value, str)), None)
            if field is None:
                raise UserError("no text field", "give another data set, or a text file")
            if (text := str(row[field] or "")).strip():
                texts.append(text)
                length += len(text)
            if length > MOST:
                break
    joined = "\n\n".join(texts)
    return CalibrationText(joined, hashlib.sha256(joined.encode()).hexdigest())


def _rows(data_set: str, configuration: str | None, data_dir: str | None) -> Iterable[Json]:
    """Return the rows of a data set's train split."""
    file = Path(data_dir or "", data_set.replace("/", "__"), configuration or "default", "train.jsonl")
    if data_dir is None:
        work_offline_if_unreachable()
    elif not file.is_file():
        raise UserError(f"neither a file nor a data set of {data_dir} (looked for {file})", REMEDY)
    try:
        with block_local_code("it", False):
            if data_dir is None:
                return datasets.load_dataset(data_set, configuration, split="train")
            return datasets.load_dataset("json", data_files=str(file.resolve()), split="train")
    except UserError as error:
        raise UserError(error.problem, "start dart-eval in another folder, or give the full path") from None
    except Exception as error:  # each library has errors of its own
        words = summary(error)[:200]
        raise UserError(f"neither a file nor a data set that can be loaded ({words})", REMEDY) from None
