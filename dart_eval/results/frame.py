"""The frame of results: every metric of every cell, what it cost, and the same of dense on the same documents.

Every table, every file of numbers and `dart_eval.records` are queries of it.

Example:
    frame = dart_eval.records("out")
    frame[frame.metric == "acc"].pivot_table("value", ["label", "sparsity"], "task")
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pandas as pd

from dart_eval.results import stats
from dart_eval.results.documents import HASHES, Answers, Compared, add_distances, answers_of, documents
from dart_eval.results.inputs import COLUMNS, DENSE, WILDCARDS, grouped, identity, labels, model_of, question, values_of
from dart_eval.results.inputs import names as inputs_that_are
from dart_eval.results.metrics import DISTANCE, kind_of
from dart_eval.results.record import Metric, Record, described
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError, nearest, remark
from dart_eval.util.text import Json, items_of

N = TypeVar("N", bound="Record | Cell")
ORDER = ["model", "task", "sparsity", "label"]  # of a table's lines
# Distances that a dense cell does not store of itself, per position.
OF_DENSE_ITSELF = {"kl": 0.0, "kl_reverse": 0.0, "rms_dp": 0.0, "top1": 1.0}
TESTED = ("dense", "chance", "recovery", "recovery_low", "recovery_high", "difference", "low", "high", "p", "p_holm")


@dataclass(frozen=True, eq=False)
class Cell:
    """A finished cell, whose answers are read when they are needed.

    Attributes:
        source: its folder or file.
        read: opens its answers.
        settings: of the record, if there is one.
    """

    key: str
    inputs: Json
    source: str
    created: str
    read: Callable[[], Answers] = field(repr=False)
    settings: Json = field(default_factory=dict)

    @cached_property
    def answers(self) -> Answers:
        """Its documents and metrics.

        Raises:
            UnreadSamples: they are missing or damaged.
        """
        return self.read()


def cell_of(store: Store, record: Record) -> Cell:
    """Return a record as a cell."""
    return Cell(
        record.key, record.inputs, str(store.folder), record.created,
        lambda: answers_of(record.metrics, store.samples(record)), record.settings,
    )  # fmt: skip


def cells(folder: Path, strict: bool = False) -> list[Cell]:
    """Return the cells of a results folder, the newest of equal ones.

    Args:
        strict: whether to refuse a folder with an unreadable record; else it is named on stderr and left out.

    Raises:
        UserError: the folder cannot be read, or holds cells that differ only in how they were computed.
    """
    store = Store(folder)
    return newest([cell_of(store, record) for record in store.load(strict)])


def newest(cells: Sequence[Cell]) -> list[Cell]:
    """Return the last finished cell for each question, as code and versions move on.

    Raises:
        UserError: they differ in more than code and versions.
    """
    chosen, replaced = [], set[str]()
    for group in grouped(cells, lambda cell: identity(cell.inputs)).values():
        places = {cell.source for cell in group}
        for name in inputs_that_are("how"):
            if len(values := values_of(name, group)) > 1:
                raise UserError(
                    f"{described(group[0])} is in {' and '.join(sorted(places))} with {name} {' and '.join(values)}",
                    "keep such cells in folders of their own, and name one of these",
                )
        chosen.append(max(group, key=lambda cell: (cell.created, cell.key)))
        replaced |= places if len({(cell.key, cell.created) for cell in group}) > 1 else set()
    if replaced:  # after a return to older code the newest run is not the current one
        remark(f"several runs of one cell in {' and '.join(sorted(replaced))}: the one finished last counts")
    return chosen


# -- cells beside cells ------------------------------------------------------------------------------------------------


def dense_of(cells: Sequence[N]) -> dict[str, N]:
    """Return the key of each cell with a dense one among them -> that, preferably of the same code and versions.

    Dense on rounded weights is no such cell.
    """
    dense = [cell for cell in cells if cell.inputs["method"] == DENSE and not cell.inputs.get("ffn_bits")]
    rivals, chosen = grouped(dense, lambda cell: question(cell.inputs)), {}
    for cell in cells:
        same = rivals.get(question(cell.inputs), [])
        build = [c for c in same if all(c.inputs.get(name) == cell.inputs.get(name) for name in ("code", "versions"))]
        if same:
            chosen[cell.key] = (build or same)[0]
    return chosen


def with_dense(cells: Sequence[N], everything: Sequence[N]) -> list[N]:
    """Return some cells of a folder, and their dense cells if these are missing among them."""
    own, there = dense_of(cells), dense_of([*cells, *everything])
    missing = [there[cell.key] for cell in cells if cell.key in there and cell.key not in own]
    return [*cells, *{dense.key: dense for dense in missing}.values()]


def counterparts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, Cell]:
    """Return the key of each of our cells with a counterpart -> theirs.

    Raises:
        UserError: several models of one name could be meant.
    """
    mine, other = ({model_of(c.inputs["model"]): c.inputs["model"] for c in side} for side in (ours, theirs))
    apart = mine.keys() ^ other.keys()
    for name in {model["name"] for model in mine.values()}:
        alone, beside = (sorted(m for m in side if m in apart and side[m]["name"] == name) for side in (mine, other))
        if min(len(alone), len(beside)) and max(len(alone), len(beside)) > 1:
            sides = f"{', '.join(alone)} in {ours[0].source}, {', '.join(beside)} in {theirs[0].source}"
            raise UserError(
                f"it is unclear which models to compare: {sides}",
                "keep each checkpoint's results in a folder of its own",
            )
        mine |= {model: other[beside[0]] for model in alone if beside}
    known = {identity(cell.inputs): cell for cell in theirs}
    asked = {cell.key: {**cell.inputs, "model": mine[model_of(cell.inputs["model"])]} for cell in ours}
    return {key: known[identity(inputs)] for key, inputs in asked.items() if identity(inputs) in known}


def differing(pairs: Iterable[tuple[Cell, Cell]], say: str, values: str) -> list[str]:
    """Return sentences on the differences beside the question between the two sides of pairs.

    Args:
        say: format of a sentence, of a name and values.
        values: format of a value of A and one of B.
    """
    changed: dict[str, set[str]] = {}
    for a, b in pairs:
        alike = all(a.inputs[name] == b.inputs[name] for name in ("method", "params"))
        left_out = {*inputs_that_are("asked"), "" if alike else "method_code"} - {"model"}
        ours, theirs = (
            {
                f"{name}.{part}" if part else name: value
                for name, whole in cell.inputs.items() if name not in left_out
                for part, value in (whole if isinstance(whole, dict) else {"": whole}).items()
            }
            for cell in (a, b)
        )  # fmt: skip
        for name in {*ours, *theirs} - {"model.name"}:
            x, y = ours.get(name), theirs.get(name)
            if x != y and not (name in WILDCARDS and None in (x, y)):
                digits = 12 if str(x)[:12] != str(y)[:12] else None  # a few, or all where these agree
                changed.setdefault(name, set()).add(values.format(str(x)[:digits], str(y)[:digits]))
    return [say.format(name, "; ".join(sorted(texts)[:3])) for name, texts in sorted(changed.items())]


def check_paired(a: Cell, b: Cell) -> None:
    """Refuse cells with other documents or prompts.

    Raises:
        UserError: names the difference, or samples that cannot be read.
    """
    frames = [cell.answers.documents for cell in (a, b)]
    left, right = (  # by eight digits of hashes, as baselines hold them
        {place: [digest[:8] for digest in hashes] for place, *hashes in frame[HASHES].itertuples(name=None)}
        for frame in frames
    )
    if other := [place for place in {**left, **right} if left.get(place) != right.get(place)]:
        what = " and ".join(f"{cell.inputs['task']} ({cell.source})" for cell in (a, b))
        task, number, _ = other[0]
        raise UserError(
            f"{what} cannot be paired: {len(other)} of {max(map(len, frames))} documents differ, or their prompts (the "
            f"first: {task} {number})",
            "run both with the same data, --limit, few-shot examples, chat template and version of lm-eval",
        )


def paired(a: Cell, b: Cell) -> list[Compared]:
    """Return every metric of a cell beside the same of another.

    Raises:
        UserError: they have other documents or prompts, or the samples of one cannot be read (UnreadSamples).
    """
    check_paired(a, b)
    rows = []
    for name in dict.fromkeys([*a.answers.measures, *b.answers.measures]):
        sides = [cell.answers.measures.get(name) for cell in (a, b)]
        for i, cell in enumerate((a, b)):
            other, dense = sides[1 - i], cell.inputs["method"] == DENSE
            if dense and sides[i] is None and other is not None and other.metric.metric in OF_DENSE_ITSELF:
                sides[i] = replace(other, x=OF_DENSE_ITSELF[other.metric.metric] * other.w)
        ours, theirs = sides
        if ours is not None and theirs is not None and ours.index == theirs.index:
            rows.append(Compared(ours, theirs))
    return rows


def with_distances(cells: Sequence[Cell], texts: bool = True) -> list[Cell]:
    """Add distances from dense to the answers of cells of a folder that have a dense one of the same documents.

    Args:
        texts: whether to compare generated texts, too, which takes time.
    """
    dense = dense_of(cells)

    def read(cell: Cell) -> Answers:
        try:
            check_paired(cell, dense[cell.key])
        except UserError:  # said where the two are compared
            return cell.answers
        return add_distances(cell.answers, dense[cell.key].answers, texts)

    return [replace(cell, read=functools.partial(read, cell)) if cell.key in dense else cell for cell in cells]


def beside_dense(cells: Sequence[Cell]) -> tuple[dict[str, list[Compared]], list[str]]:
    """Compare every metric of cells with their dense one, by key; return also why some are missing.

    Args:
        cells: of a folder, dense ones among them, with their distances from dense.
    """
    dense, rows = dense_of(cells), dict[str, list[Compared]]()
    problems: dict[str, None] = {}
    for cell in cells:
        if cell.key in dense:
            try:
                rows[cell.key] = paired(cell, dense[cell.key])
            except UserError as error:
                problems[f"Not compared with dense: {error.problem}."] = None
    if alone := dict.fromkeys(str(cell.inputs["task"]) for cell in cells if cell.key not in dense):
        problems[f"There is no dense cell for {', '.join(alone)}: run --method dense too, for recoveries."] = None
    return rows, list(problems)


# -- lines -------------------------------------------------------------------------------------------------------------


def of_tasks(
    records: Sequence[Record], names: Sequence[str] | None, aliases: Mapping[str, Sequence[str]]
) -> list[Record]:
    """Return the records of some tasks; without names of all. aliases: names of several tasks.

    Raises:
        UserError: the folder has no cell of one of them.
    """
    known = {str(r.inputs["task"]) for r in records}
    wanted = {name: known & {name, *aliases.get(name, ())} for name in items_of(names or ())}
    if unknown := [name for name, tasks in wanted.items() if not tasks]:
        there = nearest(unknown[0], known) or ", ".join(sorted(known))
        raise UserError(f"the folder has no cell of task {unknown[0]!r}", there)
    return [r for r in records if names is None or r.inputs["task"] in set().union(*wanted.values())]


def lines(store: Store, records: Sequence[Record], subtasks: bool = False) -> pd.DataFrame:
    """Return one row per cell and metric, with the columns of `dart_eval.records`.

    Args:
        store: the folder of the records, for samples.
        subtasks: whether to include the members of groups.
    """
    cells = with_distances([cell_of(store, record) for record in records])
    return lines_of(beside_dense(cells)[0], records, subtasks)


def lines_of(
    compared: Mapping[str, Sequence[Compared]], records: Sequence[Record], subtasks: bool = False
) -> pd.DataFrame:
    """Return `lines` of cells that stand beside dense (`beside_dense`). records: of the same cells."""
    dense, names, by_key = dense_of(records), labels(records), {r.key: r for r in records}
    shown = [_row(r, names[r.key], m) for r in records for m in r.metrics if subtasks or m.part_of is None]
    order = ("model", "task", "metric", "sparsity", "method")
    shown.sort(key=lambda row: (*(row[name] for name in order), json.dumps(row["params"])))
    rows = {(row["key"], row["task"], row["metric"]): row for row in shown}
    families: dict[tuple[object, ...], dict[object, list[Json]]] = {}
    for key, beside in compared.items():
        for one in beside:
            name, test, part = (key, *one.a.name), one.test, one.recovery
            if name not in rows and kind_of(one.metric.metric).group == DISTANCE:  # which records lack
                metric = replace(one.metric, value=test.value_a, stderr=one.sides[0].stderr, n=test.n)
                rows[name] = _row(by_key[key], names[key], metric)
            if row := rows.get(name):
                low, high = (part and part.interval) or (None, None)
                row |= {
                    "dense": test.value_b, "chance": one.chance, "recovery": part and part.value, "recovery_low": low,
                    "recovery_high": high, "difference": test.difference, "low": test.low, "high": test.high,
                    "p": test.p,
                }  # fmt: skip
                family = tuple(row[name] for name in ("model", "label", "sparsity", "scope", "metric"))
                families.setdefault(family, {}).setdefault(row["task"], []).append(row)
        for m in dense[key].metrics:
            if m.aggregation is None and (row := rows.get((key, m.task, m.label))):  # no test compares BLEU
                row |= {"dense": m.value, "difference": row["value"] - m.value}
    for tasks in families.values():
        for i in range(max(map(len, tasks.values()))):
            # Each task counts once; one that was repeated less often counts with its last run.
            some = [runs[min(i, len(runs) - 1)] for runs in tasks.values()]
            for row, p in zip(some, stats.holm([row["p"] for row in some]), strict=True):
                row["p_holm"] = p if row["p_holm"] is None else row["p_holm"]
    return pd.DataFrame([*rows.values()], dtype=object)


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
        "weights_read": record.weights_read, "fetched": record.fetched,
        **{name: used.get(name, getattr(record, name)) for name in ("remasks", "tokens", "cut")},
        **{name: cell.get(name) for name in COLUMNS},
        **{f"flops_{name}": value for name, value in record.flops.items()},
        **{f"memory_{name}": value for name, value in record.memory.items()},
        "memory_peak": record.measured.get("peak"), "seconds": record.measured["seconds"],
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
        and beside dense on the same documents `dense`, `chance` (the quality of guessing), `recovery` (the share of
        dense's quality above chance) with its interval `recovery_low` and `recovery_high`, `difference` (of
        perplexities, of their logarithms) with `low` and `high`, `p` (two-sided, paired) and `p_holm`, over the tasks
        of one method and metric.

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
        cell = {"model": record.inputs["model"]["name"], "label": names[record.key]}
        cell |= {name: record.inputs[name] for name in ("method", "sparsity")}
        part = documents({**sample, **cell} for sample in store.samples(record))
        parts.append(part[list(dict.fromkeys([*cell, *part]))].assign(key=record.key))
    return typed(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame()
