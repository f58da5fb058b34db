"""A baseline: a repository's file of finished cells, which later results are compared with.

One JSON file, a line per document, in an order that depends only on the results, so that its diffs are readable.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results import layout, metrics
from dart_eval.results.documents import BASIC, INDEX, documents
from dart_eval.results.inputs import HASH_DIGITS, CellInputs, identity
from dart_eval.results.outcomes import Cell, Measure, Outcome, cells, describe, rows_of
from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import read_text
from dart_eval.util.files import write as write_file
from dart_eval.util.text import Json

SCHEMA = 1
DIGITS = 6  # decimals of a document's value, so that another machine's arithmetic changes none


class _Part(TypedDict):
    """A cell of a baseline file; measures and documents are rows, as `write` orders them."""

    inputs: CellInputs
    method: NotRequired[str]
    measures: list[tuple[str, str, bool | None, tuple[str, ...], bool]]
    documents: list[tuple[str, int, str, str, str, str | None, dict[str, object]]]


class _Baseline(TypedDict):
    """A baseline file."""

    schema: Literal[1]
    cells: list[_Part]


_BASELINE = TypeAdapter(_Baseline)


def checked(outcome: Outcome, named: Collection[tuple[str, str]] = ()) -> Outcome:
    """Return what a check compares: each task's main metric, and the right answers' log-likelihoods if it has any.

    Values are rounded as in the baseline file, so that equal results stay equal.

    Args:
        named: (task, metric) of a baseline, which stand in for the main metrics of their tasks.
    """
    held = [m for m in outcome.measures if m.name != metrics.GOLD and (m.task, m.metric) in named]
    main = [*held, *(m for m in metrics.main(outcome.measures) if m.task not in {h.task for h in held})]
    tasks = {m.task for m in main}
    measures = [*main, *(m for m in outcome.measures if m.name == metrics.GOLD and m.task in tasks)]
    values: dict[str, dict[object, object]] = {}
    for m in measures:
        own = rows_of(m, outcome.documents)
        if own.index:
            values.setdefault(m.name, {}).update(zip(own.index, map(_rounded, own.columns[m.name]), strict=True))
    lines = []
    for i, key in enumerate(outcome.documents.index):
        row = {name: v[i] for name, v in outcome.documents.columns.items() if name in (*BASIC, "choices")}
        found = {name: values[name][key] for name in sorted(values) if key in values[name]}
        lines.append({**dict(zip(INDEX, key, strict=True)), **row, "metrics": found})
    return Outcome(tuple(measures), documents(line for line in lines if line["metrics"]))


def rounded(cell: Cell, named: Collection[tuple[str, str]] = ()) -> Cell:
    """Return a cell whose outcome is `checked`."""
    return dataclasses.replace(cell, read=functools.cache(lambda: checked(cell.read(), named)))


def _rounded(item: object) -> object:
    if isinstance(item, list):
        return [_rounded(i) for i in item]
    if isinstance(item, float) and math.isfinite(item):
        item = round(item, DIGITS)
        return int(item) if item == int(item) else item
    return item


def write(path: Path, results: Sequence[Cell]) -> int:
    """Write the baseline of these cells; return its number of documents.

    Raises:
        UserError: values that are not finite, or the file cannot be written.
    """
    parts, count = [], 0
    for cell in sorted(results, key=lambda c: identity(c.inputs)):
        outcome = checked(cell.read())
        count += len(outcome.documents)
        measures = [
            [m.task, m.metric, m.higher_is_better, list(m.members), m.equal]
            for m in sorted(outcome.measures, key=lambda m: (m.task, m.metric))
        ]
        columns = outcome.documents.columns
        rows = [
            _line(key, dict(zip(columns, row, strict=True)))
            for key, row in zip(outcome.documents.index, zip(*columns.values(), strict=True), strict=True)
        ]
        typed = cell.settings.get("method", cell.inputs["method"])
        method = f'"method": {json.dumps(typed, ensure_ascii=False)},\n' if typed != cell.inputs["method"] else ""
        try:
            parts.append(
                f'{{\n{method}"inputs": '
                + json.dumps(cell.inputs, sort_keys=True, indent=1, allow_nan=False)
                + f',\n"measures": {_lines(measures)},\n"documents": {_lines(rows)}\n}}'
            )
        except ValueError:
            raise UserError(
                f"{describe(cell)} has values that are not finite",
                "a baseline of them could never be met: find out why first",
            ) from None
    text = f'{{\n"schema": {SCHEMA},\n"cells": [\n' + ",\n".join(parts) + "\n]\n}\n"
    write_file(path, text, "choose another --baseline")
    return count


def _line(key: Sequence[object], row: Json) -> list[object]:
    """Return a document as a line of the file: index, digests, cluster and values."""
    doc, prompt, cluster = (row.pop(name) for name in BASIC)
    row.pop("choices", None)
    values = {name: v for name, v in row.items() if v is not None}
    return [*key, doc[:HASH_DIGITS], prompt[:HASH_DIGITS], (cluster or "")[:16] or None, values]


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
        data = layout.read(read_text(path, "baseline", remedy), _BASELINE, "baseline")
    except ValueError as error:
        raise UserError(f"baseline {path} cannot be read ({error})", remedy) from None
    found: dict[str, Cell] = {}
    for part in data["cells"]:
        cell = _cell(part, str(path))
        if cell.key in found:
            remark(f"{path} has {describe(cell)} twice: the first counts")
        found.setdefault(cell.key, cell)
    if not found:
        raise UserError(f"baseline {path} holds no cells", remedy)
    return list(found.values())


def _cell(part: _Part, source: str) -> Cell:
    inputs: dict[str, object] = {**part["inputs"]}
    measures = tuple(Measure(*measure) for measure in part["measures"])
    columns = (*INDEX, *BASIC, "metrics")
    outcome = Outcome(measures, documents(dict(zip(columns, line, strict=True)) for line in part["documents"]))
    settings = {"method": part["method"]} if "method" in part else {}
    return Cell(identity(inputs), inputs, source, "", lambda: outcome, settings=settings)
