"""The text that methods calibrate on, as `--calibration` names it: a file, or the train split of a data set."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import datasets

from dart_eval.evaluation.unsafe import block_local_code
from dart_eval.models.loading import work_offline_if_unreachable
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.util.errors import UserError, summary
from dart_eval.util.files import read_text

MOST = 4_000_000  # characters of a data set, from its beginning
TEXTS = ("string", "large_string")
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
    asked, said = {"path": data_set, "name": configuration or None}, f"calibration {data_set}"
    if data_dir is None:
        work_offline_if_unreachable()
    else:
        file = Path(data_dir, data_set.replace("/", "__"), configuration or "default", "train.jsonl").resolve()
        asked = {"path": "json", "data_files": str(file)}
        if not file.is_file():
            raise UserError(f"{said}: neither a file nor a data set of {data_dir} (looked for {file})", REMEDY)
    try:
        with block_local_code(said, False):
            rows = datasets.load_dataset(**asked, split="train")
    except UserError as error:
        raise UserError(error.problem, "start dart-eval in another folder, or give the full path") from None
    except Exception as error:  # each library has errors of its own
        words = summary(error)[:200]
        raise UserError(f"{said}: neither a file nor a data set that can be loaded ({words})", REMEDY) from None
    field = next((name for name, of in rows.features.items() if getattr(of, "dtype", "") in TEXTS), None)
    if field is None:
        raise UserError(f"{said}: no text field", "give another data set, or a text file")
    texts, length = [], 0
    for text in (row[field] or "" for row in rows.select_columns(field)):
        if text.strip():
            texts.append(text)
            length += len(text)
        if length > MOST:
            break
    joined = "\n\n".join(texts)
    return CalibrationText(joined, hashlib.sha256(joined.encode()).hexdigest())
