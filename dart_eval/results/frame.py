"""The frame of results: every metric of every cell, what it cost, and the same of dense on the same documents.

Every table, every file of numbers and `dart_eval.records` are queries of it.

Example:
    frame = dart_eval.records("out")
    frame[frame.metric == "acc"].pivot_table("value", ["label", "sparsity"], "task")
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dart_eval.results import stats
from dart_eval.results.cells import Cell, cell_of, dense_of
from dart_eval.results.documents import Answers, Compared, add_distances, against, check_paired, documents
from dart_eval.results.inputs import COLUMNS, DENSE
from dart_eval.results.labels import labels
from dart_eval.results.metrics import DISTANCE, kind_of
from dart_eval.results.record import Metric, Record
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json, items_of

ORDER = ["model", "task", "sparsity", "label"]  # of a table's lines
TESTED = ("dense", "chance", "recovery", "recovery_low", "recovery_high", "difference", "low", "high", "p", "p_holm")


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
    known = {str(r.inputs["task"]) for r in records}
    wanted: set[str] = set()
    for name in items_of(names):
        tasks = known & {name, *aliases.get(name, ())}
        if not tasks:
            raise UserError(
                f"the folder has no cell of task {name!r}", nearest(name, known) or ", ".join(sorted(known))
            )
        wanted |= tasks
    return [r for r in records if r.inputs["task"] in wanted]


def paired(a: Cell, b: Cell) -> list[Compared]:
    """Return every metric of a cell beside the same of another.

    Raises:
        UnreadSamples: the samples of one cannot be read.
        Unpaired: they have other documents or prompts.
    """
    names = [f"{cell.inputs['task']} ({cell.source})" for cell in (a, b)]
    check_paired(names, [cell.inputs.get("limit") for cell in (a, b)], a.answers, b.answers)
    return against(a.answers, b.answers, (a.inputs["method"] == DENSE, b.inputs["method"] == DENSE))


def with_distances(cells: Sequence[Cell], texts: bool = True) -> list[Cell]:
    """Add distances from dense to the answers of cells with a dense cell of the same documents.

    Args:
        cells: of a folder.
        texts: whether to compare generated texts, too, which takes time.
    """
    dense = dense_of(cells)

    def read(cell: Cell, reference: Cell) -> Answers:
        try:
            check_paired(["", ""], [None, None], cell.answers, reference.answers)
        except UserError:  # said where the two are compared
            return cell.answers
        return add_distances(cell.answers, reference.answers, texts)

    reads = {cell.key: functools.partial(read, cell, dense[cell.key]) for cell in cells if cell.key in dense}
    return [replace(cell, read=reads.get(cell.key, cell.read)) for cell in cells]


def beside_dense(cells: Sequence[Cell]) -> tuple[dict[str, list[Compared]], list[str]]:
    """Compare every metric of cells with their dense one, by key; return also why some are missing.

    Args:
        cells: of a folder, dense ones among them, with their distances from dense.
    """
    dense = dense_of(cells)
    rows: dict[str, list[Compared]] = {}
    problems: dict[str, None] = {}
    alone: dict[str, None] = {}
    for cell in cells:
        if cell.key not in dense:
            alone[str(cell.inputs["task"])] = None
            continue
        try:
            rows[cell.key] = paired(cell, dense[cell.key])
        except UserError as error:
            problems[f"Not compared with dense: {error.problem}."] = None
    if alone:
        problems[f"There is no dense cell for {', '.join(alone)}: run --method dense too, for recoveries."] = None
    return rows, list(problems)


def lines(store: Store, records: Sequence[Record], subtasks: bool = False) -> pd.DataFrame:
    """Return one row per cell and metric: its value, dense's on the same documents, and their comparison.

    Beside what a record holds there are `dense`, `chance` (the quality of guessing), `recovery` (the share of dense's
    quality above chance) with its interval `recovery_low` and `recovery_high`, `difference` (of perplexities, of their
    logarithms) with `low` and `high`, `p` (two-sided, paired) and `p_holm`, over the tasks of one method and metric.

    Args:
        store: the folder, for samples.
        records: its cells.
        subtasks: whether to include the members of groups.
    """
    cells = with_distances([cell_of(store, record) for record in records])
    return lines_of(beside_dense(cells)[0], records, subtasks)


def lines_of(
    compared: Mapping[str, Sequence[Compared]], records: Sequence[Record], subtasks: bool = False
) -> pd.DataFrame:
    """Return `lines` of cells that stand beside dense (`beside_dense`). records: of the same cells."""
    rows = {(row["key"], row["task"], row["metric"]): row for row in _rows(records, subtasks)}
    first = {(row["key"], row["task"]): row for row in reversed(rows.values())}
    families: dict[tuple[object, ...], dict[object, list[Json]]] = {}
    for key, beside in compared.items():
        for one in beside:
            name = (key, *one.a.name)
            if name not in rows and kind_of(one.metric.metric).group == DISTANCE:  # which records lack
                number = {"value": one.test.value_a, "stderr": one.sides[0].stderr, "n": one.test.n}
                up = one.metric.higher_is_better
                rows[name] = {**first[name[:2]], "metric": name[2], **number, "higher_is_better": up}
            if row := rows.get(name):
                row |= _tested(one)
                family = (row["model"], row["label"], row["sparsity"], row["scope"], row["metric"])
                families.setdefault(family, {}).setdefault(row["task"], []).append(row)
    for tasks in families.values():
        for i in range(max(map(len, tasks.values()))):
            # Each task counts once; one that was repeated less often counts with its last run.
            some = [runs[min(i, len(runs) - 1)] for runs in tasks.values()]
            for row, p in zip(some, stats.holm([row["p"] for row in some]), strict=True):
                row["p_holm"] = p if row["p_holm"] is None else row["p_holm"]
    dense = dense_of(records)
    for record in (r for r in records if r.key in compared):
        values = {(m.task, m.label): m.value for m in dense[record.key].metrics if m.aggregation is None}
        for (task, label), value in values.items():  # which no test compares, BLEU for example
            if row := rows.get((record.key, task, label)):
                row |= {"dense": value, "difference": row["value"] - value}
    return pd.DataFrame([*rows.values()], dtype=object)


def _tested(one: Compared) -> Json:
    """Return what is said of a metric beside dense's."""
    ends = (one.recovery and one.recovery.interval) or (None, None)
    return {
        "dense": one.test.value_b, "chance": one.chance, "recovery": one.recovery.value if one.recovery else None,
        "recovery_low": ends[0], "recovery_high": ends[1], "difference": one.test.difference, "low": one.test.low,
        "high": one.test.high, "p": one.test.p,
    }  # fmt: skip


def _rows(records: Sequence[Record], subtasks: bool = False) -> list[Json]:
    """Return one row per metric of each record, sorted by model, task, metric, sparsity and method."""
    names = labels(records)
    rows = [_row(r, names[r.key], m) for r in records for m in r.metrics if subtasks or m.part_of is None]
    order = ("model", "task", "metric", "sparsity", "method")
    return sorted(rows, key=lambda row: (*(row[name] for name in order), json.dumps(row["params"])))


def _row(record: Record, label: str, metric: Metric | None = None) -> Json:
    """Return a metric of a record with all columns of tables; without a metric, those of the whole cell."""
    cell, used, number = record.inputs, {}, {}
    if metric is not None:
        used = record.by_task.get(metric.task, {})  # a member of a tag or group; the whole cell otherwise
        names = ("value", "stderr", "n", "higher_is_better")
        number = {"metric": metric.label, **{name: getattr(metric, name) for name in names}}
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
        **(dict.fromkeys(TESTED) if metric else {}),
    }  # fmt: skip


def cells_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per record, in the order of a table's lines, with the columns of `lines` but the metric's."""
    names = labels(records)
    return in_order(typed(pd.DataFrame([_row(r, names[r.key]) for r in records], dtype=object)))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort a frame in the order of a table's lines."""
    keys = list(frame[ORDER].itertuples(index=False, name=None))
    return frame.iloc[sorted(range(len(keys)), key=keys.__getitem__)]


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert the numbers in a frame of objects.

    Texts stay objects: some names are not valid Unicode, which pandas' own type for text refuses.
    """
    plain = [name for name, column in frame.items() if not any(isinstance(v, str) for v in column)]
    return frame.assign(**{str(name): pd.Series(frame[name].tolist(), frame.index) for name in plain})


# -- for Python --------------------------------------------------------------------------------------------------------


def records(folder: str | Path, subtasks: bool = False) -> pd.DataFrame:
    """Every metric of every finished cell, with what the cell was asked, what it read and what it cost.

    The columns are those of `dart-eval tables --format csv`, which is made of the same rows.

    Args:
        folder: that `dart-eval run --output` wrote.
        subtasks: also the members of groups, mmlu's subjects for example.

    Returns:
        One row a metric: `model`, `label`, `method`, `params`, `sparsity`, `task`, `metric`, `value`, `stderr`, `n` ...
        and beside dense on the same documents `dense`, `chance`, `recovery`, `difference`, `p`, `p_holm` ...

    Raises:
        UserError: there are no results in the folder.
    """
    store = Store(Path(folder).expanduser())
    return typed(lines(store, store.load(), subtasks))


def samples(folder: str | Path, task: str | None = None) -> pd.DataFrame:
    """Every document of every finished cell, with the values of its metrics.

    Two cells that were asked the same share `doc_hash` and `prompt_hash`: merge on `task`, `doc_id` and `filter`, and
    compare pairs.

    Args:
        folder: that `dart-eval run --output` wrote.
        task: of this task's cells alone.

    Returns:
        One row a document and filter: `model`, `label`, `method`, `sparsity`, `task`, `doc_id`, `filter`, a column for
        each metric (a perplexity's holds log-likelihood and words), `tokens`, `remasks`, `effective_sparsity`,
        `responses`, `doc_hash`, `prompt_hash`, `cluster` and the cell's `key`.

    Raises:
        UserError: there are no results in the folder, or a cell's samples are missing or damaged.
    """
    store = Store(Path(folder).expanduser())
    known = store.load()
    names = labels(known)
    parts = []
    for record in of_tasks(known, None if task is None else [task], {}):
        part = documents(store.samples(record))
        cell = {"model": record.inputs["model"]["name"], "label": names[record.key]}
        cell |= {name: record.inputs[name] for name in ("method", "sparsity")}
        for i, (name, value) in enumerate(cell.items()):
            part.insert(i, name, pd.Series([value] * len(part), dtype=object))
        parts.append(part.assign(key=record.key))
    return typed(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame()
