"""The tables of a paper from one file: which methods, sparsities, columns; what to run for them; how to lay them out.

The file is YAML; docs/paper.md shows one. A method or a column more is a line more in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_eval.config import RunConfig, checked
from dart_eval.errors import UserError, naming, nearest, summary
from dart_eval.plan import methods_of
from dart_eval.results.paper_tables import FIELDS, Column, Layout, Reported, Row
from dart_eval.yamls import read_mapping, shown

SHIPPED = Path(__file__).parent / "data"
TABLE_KEYS = ("name", "title", "methods", "sparsity", "columns", "mean", "reported", "note")
COLUMN_KEYS = ("task", "metric", "field", "num_fewshot", "limit", "limit_share")
REPORTED_KEYS = ("label", "sparsity", "values", "source")


@dataclass(frozen=True)
class PaperSpec:
    """A paper's tables: what they are about, what runs they need, their layouts."""

    about: str
    configs: tuple[RunConfig, ...]
    layouts: tuple[Layout, ...]


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
    _keys(data, ("about", "methods", "sparsity", "tables"), str(path))
    if not isinstance(data.get("tables"), list) or not data["tables"]:
        raise UserError(f"{path} has no tables", "see docs/paper.md")
    layouts, configs = [], []
    for table in data["tables"]:
        where = f"{path}, table {shown(table.get('name'))}" if isinstance(table, dict) else f"{path}, a table"
        _keys(table, TABLE_KEYS, where)
        both = {"methods": data.get("methods"), "sparsity": data.get("sparsity"), **table}
        try:
            with naming(f"{where}: "):
                layout, specs = _layout(both, base)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}: a value is of the wrong kind ({summary(error)})", "see docs/paper.md") from None
        layouts.append(layout)
        configs += _configs(layout, specs, base)
    names = [layout.name for layout in layouts]
    if len(names) > len(set(names)):
        raise UserError(f"{path}: two tables have one name", "names become file names")
    return PaperSpec(str(data.get("about", "")), tuple(configs), tuple(layouts))


def _keys(data: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{where} must hold keys and values, not {shown(data)}", "see docs/paper.md")
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}", nearest(str(key), known))


def _layout(table: Mapping[str, Any], base: RunConfig) -> tuple[Layout, tuple[str, ...]]:
    """The layout of a table, and its methods as typed."""
    for key in ("name", "title", "methods", "sparsity", "columns"):
        if not table.get(key):
            raise UserError(f"it needs {key}", "see docs/paper.md")
    if Path(str(table["name"])).name != str(table["name"]) or "\0" in str(table["name"]):
        raise UserError("the name is no file name", "names become file names")
    methods = table["methods"]
    if not isinstance(methods, dict):
        raise UserError("methods must be labels with methods", "for example `DART: dart`")
    specs = checked("method", list(methods.values()))
    made = [methods_of(dataclasses.replace(base, method=(spec,)))[0] for spec in specs]
    rows = tuple(Row(str(label), m.name, m.params(), m.sized) for label, m in zip(methods, made, strict=True))
    if not isinstance(table["columns"], dict):
        raise UserError("columns must be heads with tasks", "for example `BoolQ: {task: boolq, metric: acc}`")
    columns = tuple(_column(str(head), column, base) for head, column in table["columns"].items())
    mean = bool(table.get("mean", False))
    if mean and len({c.metric for c in columns}) > 1:
        raise UserError("a mean needs columns of one metric", "leave `mean` out")
    reported = []
    for entry in table.get("reported") or []:
        _keys(entry, REPORTED_KEYS, "reported")
        unknown = sorted(set(entry["values"]) - {c.head for c in columns})
        if unknown:
            raise UserError(
                f"reported column {unknown[0]!r} is not there", nearest(unknown[0], [c.head for c in columns])
            )
        values = {str(k): float(v) for k, v in entry["values"].items()}
        reported.append(Reported(str(entry["label"]), float(entry["sparsity"]), values, str(entry["source"])))
    layout = Layout(
        str(table["name"]), str(table["title"]), rows, checked("sparsity", table["sparsity"]), columns, mean,
        tuple(reported), str(table.get("note") or ""),
    )  # fmt: skip
    return layout, specs


def _column(head: str, column: Any, base: RunConfig) -> Column:
    _keys(column, COLUMN_KEYS, f"column {head!r}")
    tasks = column.get("task")
    tasks = checked("tasks", tasks) if tasks else ()
    metric, field = str(column.get("metric") or ""), str(column.get("field") or "")
    if not tasks or bool(metric) == bool(field):
        raise UserError(f"column {head!r} needs a task and either a metric or a field", "see docs/paper.md")
    if field and field not in FIELDS:
        raise UserError(f"column {head!r}: unknown field {field!r}", nearest(field, FIELDS))
    limit, shots = (None if column.get(k) is None else checked(k, column[k]) for k in ("limit", "num_fewshot"))
    if base.limit is not None:
        share = float(column.get("limit_share", 1))
        limit = base.limit * share if base.limit < 1 else max(1, round(base.limit * share))
    return Column(head, tasks, metric, field, shots, limit)


def _configs(layout: Layout, specs: tuple[str, ...], base: RunConfig) -> list[RunConfig]:
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
