"""A baseline: a repository's file of finished cells, which later results are compared with.

One JSON file, a line per document, in an order that depends only on the results, so that its diffs are readable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results.documents import HASHES, INDEX, Answers, documents, measured
from dart_eval.results.frame import Cell, cells
from dart_eval.results.inputs import HASH_DIGITS, CellInputs, identity
from dart_eval.results.metrics import main
from dart_eval.results.record import Metric, holds, read
from dart_eval.util import files
from dart_eval.util.errors import UserError, remark
from dart_eval.util.text import Json

SCHEMA = 1
DIGITS = 6  # decimals of a document's value, so that another machine's arithmetic changes none
COLUMNS = (*INDEX, *HASHES, "cluster")  # of a document's line, before its values


class _Part(TypedDict):
    """A cell of a baseline file; measures and documents are rows, as `write` orders them."""

    inputs: Annotated[Json, holds(CellInputs)]
    method: NotRequired[str]
    measures: list[tuple[str, str, bool | None, tuple[str, ...], bool]]
    documents: list[tuple[str, int, str, str, str, str | None, dict[str, object]]]


class _Baseline(TypedDict):
    """A baseline file."""

    schema: Literal[1]
    cells: list[_Part]


_BASELINE = TypeAdapter(_Baseline)


def rounded(answers: Answers, named: Collection[tuple[str, str]] = ()) -> Answers:
    """Return what a check compares: each task's main metric, and the right answers' log-likelihoods if it has any.

    Values are rounded as in the baseline file, so that equal results stay equal.

    Args:
        named: (task, metric) of a baseline, which stand in for the main metrics of their tasks.
    """
    chosen = main((measure.metric for measure in answers.measures.values()), named, gold=True)
    measures = [answers.measures[m.task, m.label] for m in chosen]
    frame = answers.documents.reindex(columns=[*COLUMNS, "choices"])
    for name in {m.metric for m in chosen}:
        places = {key for measure in measures if measure.metric.metric == name for key in measure.index}
        values = [_rounded(value) if key in places else None for key, value in answers.documents[name].items()]
        frame[name] = pd.Series(values, frame.index, dtype=object)
    covered = {key for measure in measures for key in measure.index}
    frame = frame[[key in covered for key in frame.index]]
    again = (measured(measure.metric, measure.members, frame) for measure in measures)
    return Answers(frame, {measure.name: measure for measure in again if measure is not None})


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        value = round(value, DIGITS)
        return int(value) if value == int(value) else value
    return value


def write(path: Path, results: Sequence[Cell]) -> int:
    """Write the baseline of these cells; return its number of documents.

    Raises:
        UserError: values that are not finite, or the file cannot be written.
    """
    parts, count = [], 0
    for cell in sorted(results, key=lambda c: identity(c.inputs)):
        answers = rounded(cell.answers)
        measures = [
            [*name, m.metric.higher_is_better, list(m.members), m.metric.weights == "tasks"]
            for name, m in sorted(answers.measures.items())
        ]
        lines = []
        for row in answers.documents.to_dict("records"):
            *index, document, prompt, cluster, _ = (row.pop(name) for name in (*COLUMNS, "choices"))
            values = {name: value for name, value in row.items() if value is not None}
            hashes = [document[:HASH_DIGITS], prompt[:HASH_DIGITS], (cluster or "")[:16] or None]
            lines.append([*index, *hashes, values])
        typed = cell.settings.get("method", cell.inputs["method"])
        method = f'"method": {json.dumps(typed, ensure_ascii=False)},\n' if typed != cell.inputs["method"] else ""
        try:
            inputs = json.dumps(cell.inputs, sort_keys=True, indent=1, allow_nan=False)
            rows = f'"measures": {_lines(measures)},\n"documents": {_lines(lines)}'
        except ValueError:
            raise UserError(
                f"{cell.describe()} has values that are not finite",
                "a baseline of them could never be met: find out why first",
            ) from None
        count += len(lines)
        parts.append(f'{{\n{method}"inputs": {inputs},\n{rows}\n}}')
    text = f'{{\n"schema": {SCHEMA},\n"cells": [\n' + ",\n".join(parts) + "\n]\n}\n"
    files.write(path, text, "choose another --baseline")
    return count


def _lines(rows: Sequence[object]) -> str:
    return "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False, allow_nan=False, sort_keys=True) for r in rows) + "\n]"


def load_baseline(path: Path) -> list[Cell]:
    """Return the cells of a baseline file, or of a results folder.

    Raises:
        UserError: it cannot be read, is not a baseline, or is empty.
    """
    if path.is_dir():
        return cells(path, strict=True)
    remedy = f"make it from good results: dart-eval check RESULTS --baseline {path} --update"
    try:
        data = read(files.read_text(path, "baseline", remedy), _BASELINE, "baseline")
        parts = [_cell(part, str(path)) for part in data["cells"]]
    except ValueError as error:
        raise UserError(f"baseline {path} cannot be read ({error})", remedy) from None
    if not parts:
        raise UserError(f"baseline {path} holds no cells", remedy)
    first: dict[str, Cell] = {}
    for cell in parts:
        if first.setdefault(cell.key, cell) is not cell:
            remark(f"{path} has {cell.describe()} twice: the first counts")
    return list(first.values())


def _cell(part: _Part, source: str) -> Cell:
    """Return a part of the file as a cell.

    Raises:
        ValueError: a metric does not follow from the values of its documents.
    """
    lines = (dict(zip((*COLUMNS, "metrics"), line, strict=True)) for line in part["documents"])
    frame = documents({**line, "choices": 0} for line in lines)
    measures = {}
    for task, label, up, members, by_task in part["measures"]:
        name, _, filter_ = label.partition(",")
        weights: Literal["documents", "tasks"] = "tasks" if by_task else "documents"
        metric = Metric(task, name, math.nan, None, 0, up, filter=filter_ or "none", weights=weights)
        measure = measured(metric, members, frame)
        if measure is not None:
            measures[measure.name] = measure
        elif metric.aggregation:  # all but BLEU, which earlier versions compared
            raise ValueError(f"its documents do not give {task} {label}")
    inputs = {**part["inputs"]}
    settings = {"method": part["method"]} if "method" in part else {}
    return Cell(identity(inputs), inputs, source, "", lambda: Answers(frame, measures), settings)
