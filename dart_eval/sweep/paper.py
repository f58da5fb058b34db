"""The tables of a paper from one file: which methods, sparsities, columns; what to run for them; how to lay them out.

The file is YAML; docs/paper.md shows one. A method or a column more is a line more in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.results.paper_tables import FIELDS, PaperColumn, PaperRow, Reported, TableLayout
from dart_eval.sweep.config import RunConfig, checked
from dart_eval.sweep.plan import methods_of
from dart_eval.util.errors import UserError, naming, nearest, summary
from dart_eval.util.text import short_repr
from dart_eval.util.yamls import read_mapping

SHIPPED = Path(__file__).parents[1] / "data"
TABLE_KEYS = ("name", "title", "methods", "sparsity", "columns", "mean", "reported", "note")
COLUMN_KEYS = ("task", "metric", "field", "num_fewshot", "limit", "limit_share")
SEE = "see docs/paper.md"
REPORTED_KEYS = ("label", "sparsity", "values", "source")


@dataclass(frozen=True)
class PaperSpec:
    """A paper's tables: what they are about, what runs they need, their layouts."""

    about: str
    configs: tuple[RunConfig, ...]
    layouts: tuple[TableLayout, ...]


def load(name: str, base: RunConfig) -> PaperSpec:
    """The tables of a file, or of one that is shipped (`smoke`, `ten`), to be run with the settings of `base`.

    Args:
        base: model, data, output and the rest; `base.limit` overrides the limits in the file.

    Raises:
        UserError: the file cannot be read, or something in it is not understood.
    """
    shipped = {p.stem.removeprefix("paper-"): p for p in sorted(SHIPPED.glob("paper-*.yaml"))}
    path = shipped.get(name, Path(name))
    data = read_mapping(path, "paper", "tables: ...", f"give a YAML file, or one of: {', '.join(shipped)}")
    _known(data, ("about", "methods", "sparsity", "tables"), str(path))
    if not isinstance(data.get("tables"), list) or not data["tables"]:
        raise UserError(f"{path} has no tables", SEE)
    layouts, configs = [], []
    for table in data["tables"]:
        where = f"{path}, table {short_repr(table.get('name'))}" if isinstance(table, dict) else f"{path}, a table"
        _known(table, TABLE_KEYS, where)
        try:
            with naming(f"{where}: "):
                layout, specs = _layout({k: data.get(k) for k in ("methods", "sparsity")} | table, base)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}: a value is of the wrong kind ({summary(error)})", SEE) from None
        layouts.append(layout)
        configs += _configs(layout, specs, base)
    if len({layout.name for layout in layouts}) < len(layouts):
        raise UserError(f"{path}: two tables have the same name", "rename one: names become file names")
    return PaperSpec(str(data.get("about", "")), tuple(configs), tuple(layouts))


def _known(data: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """The data, which must be a mapping with these keys alone."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must contain keys and values, not {short_repr(data)}", SEE)
    for key in data:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}", nearest(str(key), keys))
    return data


def _layout(table: Mapping[str, Any], base: RunConfig) -> tuple[TableLayout, tuple[str, ...]]:
    """The layout of a table, and its methods as typed."""
    for key in ("name", "title", "methods", "sparsity", "columns"):
        if not table.get(key):
            raise UserError(f"it needs {key}", SEE)
    name, methods, heads = str(table["name"]), table["methods"], table["columns"]
    if Path(name).name != name or "\0" in name:
        raise UserError("the name is not a file name", "rename it: names become file names")
    if not isinstance(methods, dict):
        raise UserError("methods must map labels to methods", "for example `DART: dart`")
    if not isinstance(heads, dict):
        raise UserError("columns must map heads to tasks", "for example `BoolQ: {task: boolq, metric: acc}`")
    specs = checked("method", list(methods.values()))
    made = [methods_of(dataclasses.replace(base, method=(spec,)))[0] for spec in specs]
    rows = tuple(PaperRow(str(label), m.name, m.params(), m.sized) for label, m in zip(methods, made, strict=True))
    columns = tuple(_column(str(head), column, base) for head, column in heads.items())
    mean = bool(table.get("mean", False))
    if mean and len({c.metric for c in columns}) > 1:
        raise UserError("a mean needs columns with the same metric", "leave `mean` out")
    reported = tuple(_reported(entry, [c.head for c in columns]) for entry in table.get("reported") or [])
    sparsity, note = checked("sparsity", table["sparsity"]), str(table.get("note") or "")
    return TableLayout(name, str(table["title"]), rows, sparsity, columns, mean, reported, note), specs


def _reported(entry: Any, heads: Sequence[str]) -> Reported:
    """A row of somebody else's numbers."""
    values = {str(k): float(v) for k, v in _known(entry, REPORTED_KEYS, "reported")["values"].items()}
    for head in sorted(values.keys() - set(heads)):
        raise UserError(f"unknown reported column {head!r}", nearest(head, heads))
    return Reported(str(entry["label"]), float(entry["sparsity"]), values, str(entry["source"]))


def _column(head: str, column: Any, base: RunConfig) -> PaperColumn:
    """A column; the limit of the command goes before its own."""
    asked = _known(column, COLUMN_KEYS, f"column {head!r}")
    metric, field = (str(asked.get(k) or "") for k in ("metric", "field"))
    if not asked.get("task") or bool(metric) == bool(field):
        raise UserError(f"column {head!r} needs a task and either a metric or a field", SEE)
    if field and field not in FIELDS:
        raise UserError(f"column {head!r}: unknown field {field!r}", nearest(field, FIELDS))
    limit, shots = (None if asked.get(k) is None else checked(k, asked[k]) for k in ("limit", "num_fewshot"))
    if base.limit is not None:
        share = float(asked.get("limit_share", 1))
        limit = base.limit * share if base.limit < 1 else max(1, round(base.limit * share))
    return PaperColumn(head, checked("tasks", asked["task"]), metric, field, shots, limit)


def _configs(layout: TableLayout, specs: tuple[str, ...], base: RunConfig) -> list[RunConfig]:
    """The sweeps that fill a table: one for each number of shots and limit."""
    groups: dict[tuple[int | None, int | None], dict[str, None]] = {}
    for column in layout.columns:
        groups.setdefault((column.num_fewshot, column.limit), {}).update(dict.fromkeys(column.tasks))
    return [
        dataclasses.replace(
            base, method=specs, sparsity=layout.sparsity, tasks=tuple(tasks), num_fewshot=shots, limit=limit
        )
        for (shots, limit), tasks in groups.items()
    ]
