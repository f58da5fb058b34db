"""Records as rows and data frames: one row per metric of a cell, or one row per cell.

The base of every table, file of numbers and `dart_eval.records`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dart_eval.results.inputs import COLUMNS
from dart_eval.results.labels import labels
from dart_eval.results.record import Metric, Record
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json, items_of

if TYPE_CHECKING:
    import pandas as pd

ORDER = ["model", "task", "sparsity", "label"]  # of a table's lines


def of_tasks(
    records: Sequence[Record], names: Sequence[str] | None, aliases: Mapping[str, Sequence[str]]
) -> list[Record]:
    """Return the records of some tasks.

    Args:
        records: of a folder.
        names: as typed; None: all.
        aliases: names of several tasks.

    Raises:
        UserError: the folder has no cell of one of them.
    """
    if names is None:
        return list(records)
    had = {str(r.inputs["task"]) for r in records}
    wanted: set[str] = set()
    for name in items_of(names):
        found = had & {name, *aliases.get(name, ())}
        if not found:
            raise UserError(f"the folder has no cell of task {name!r}", nearest(name, had) or ", ".join(sorted(had)))
        wanted |= found
    return [r for r in records if r.inputs["task"] in wanted]


def rows(records: Sequence[Record], subtasks: bool = False) -> list[Json]:
    """Return one row per metric of each record, sorted by model, task, metric, sparsity and method.

    Args:
        records: of a folder.
        subtasks: also the members of groups, mmlu's subjects for example.
    """
    names = labels(records)
    found = [_row(r, names[r.key], m) for r in records for m in r.metrics if subtasks or m.part_of is None]
    order = ("model", "task", "metric", "sparsity", "method")
    return sorted(found, key=lambda row: (*(row[name] for name in order), json.dumps(row["params"])))


def metrics_frame(lines: Sequence[dict[str, object]]) -> pd.DataFrame:
    """Return rows, or those of `frame.lines`, as a data frame."""
    import pandas as pd

    return typed(pd.DataFrame(lines, dtype=object))


def cells_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per record, in the order of a table's lines, with the columns of `rows` but the metric's."""
    names = labels(records)
    return in_order(metrics_frame([_row(r, names[r.key]) for r in records]))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort a frame in the order of a table's lines."""
    lines = list(frame[ORDER].itertuples(index=False, name=None))
    return frame.iloc[sorted(range(len(lines)), key=lines.__getitem__)]


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert the numbers in a frame of objects.

    Texts stay objects: some names are not valid Unicode, which pandas' own type for text refuses.
    """
    import pandas as pd

    plain = [name for name, column in frame.items() if not any(isinstance(v, str) for v in column)]
    return frame.assign(**{str(name): pd.Series(frame[name].tolist(), frame.index) for name in plain})


def _row(record: Record, label: str, metric: Metric | None = None) -> dict[str, object]:
    """Return a metric of a record with all columns of tables; without a metric, those of the whole cell."""
    cell, used, number = record.inputs, {}, {}
    if metric is not None:
        used = record.by_task.get(metric.task, {})  # a member of a tag or group; the whole cell otherwise
        names = ("metric", "value", "stderr", "n", "higher_is_better")
        number = {name: getattr(metric, name) for name in names}
    return {
        "model": cell["model"]["name"], "label": label,
        **{name: cell[name] for name in ("method", "params", "sparsity", "scope")},
        "task": cell["task"] if metric is None else metric.task, **number,
        **{name: used.get(name, getattr(record, name)) for name in ("mask_sparsity", "effective_sparsity")},
        "weights_read": record.weights_read,
        **{name: used.get(name, getattr(record, name)) for name in ("remasks", "tokens", "cut")},
        **{name: cell.get(name) for name in COLUMNS},
        **{f"flops_{name}": value for name, value in record.flops.items()},
        **{f"memory_{name}": value for name, value in record.memory.items()},
        "memory_peak": record.measured.get("peak"), "seconds": record.seconds,
        "command": record.settings.get("command"), "key": record.key,
    }  # fmt: skip
