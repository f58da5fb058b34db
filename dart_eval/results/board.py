"""The board: one row a method and sparsity, in levels of the FFN bytes that a decoded token reads.

Rows of one block have run on the same tasks; rows that lack some of them are in a block of their own. No mean combines
two metrics. The first row of a level is tested against every other one on the same documents. It was chosen by the
tested values, so each p counts for all pairs that could have been chosen (`verdict.stand_of`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dart_eval.results import distance, frame, inputs, metrics, outcomes, seeds, stats, verdict
from dart_eval.results.blocks import (
    CONTROL,
    DEFAULT_SCOPE,
    GUESSING,
    PRUNED,
    ROUNDING,
    UPPER_BOUND,
    WIDTH_OF_LEVEL,
    Block,
    Board,
    BoardRow,
    Quality,
    Tasks,
    qualities,
    split,
)
from dart_eval.results.estimates import Estimate, Share, above_zero, mean
from dart_eval.results.format import sparsity
from dart_eval.results.frame import Compared
from dart_eval.results.inputs import DENSE
from dart_eval.results.labels import grouped, labels
from dart_eval.results.record import Metric, Record
from dart_eval.results.speeds import Speed, of_cell, unlike
from dart_eval.results.store import Store
from dart_eval.util.bits import LAST_BITS

NOTHING = Share(0.0, (0.0, 0.0))  # share of guessing in dense's quality above guessing


def boards(
    store: Store, records: Sequence[Record], speeds: Sequence[Speed] = (), metric: str | None = None
) -> list[Board]:
    """Return a board for each model of a folder.

    Args:
        store: the folder, for samples.
        records: its cells.
        speeds: measured by `bench decode`.
        metric: replaces the main metric of tasks that have it.
    """
    current, older = newest(records)
    by_model = grouped(current, lambda r: inputs.model_of(r.inputs["model"]))
    same_name = len({r.inputs["model"]["name"] for r in current}) < len(by_model)
    notes = [f"Left out: {older} older run{'s' * (older > 1)} of cells. The last run of each counts."] if older else []
    return [
        _board(store, model if same_name else found[0].inputs["model"]["name"], found, speeds, notes, metric)
        for model, found in sorted(by_model.items())
    ]


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Return the last of equal cells on one dtype, device and calibration, and the number of older ones."""
    last: dict[tuple[object, ...], Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.key)):
        asked = inputs.question(r.inputs, [] if inputs.matters("scope", r.inputs) else ["scope"])
        last[(asked, *map(r.inputs.get, inputs.CALIBRATED))] = r
    keys = {r.key for r in last.values()}
    return [r for r in records if r.key in keys], len(records) - len(keys)


def by_row(records: Sequence[Record]) -> dict[tuple[str, float, str | None, str], list[Record]]:
    """Return the cells of each row, by their label, sparsity, scope and model: one for each task."""
    names = labels(records)
    groups: dict[tuple[str, float, str | None, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: str(r.inputs["task"])):
        scope = str(r.inputs["scope"]) if inputs.matters("scope", r.inputs) else None
        row = names[r.key], float(r.inputs["sparsity"]), scope, inputs.model_of(r.inputs["model"])
        groups.setdefault(row, []).append(r)
    return groups


def _board(
    store: Store, model: str, records: Sequence[Record], speeds: Sequence[Speed], notes: Sequence[str],
    metric: str | None,
) -> Board:  # fmt: skip
    together = seeds.together(records)
    merged = seeds.mean_records(together)
    beside, problems = frame.beside_dense(distance.beside_dense([outcomes.cell_of(store, r) for r in records]))
    beside = {some[0].key: seeds.mean_compared([beside.get(r.key, ()) for r in some]) for some in together}
    drafts = [_row(label, group, speeds, metric) for (label, *_), group in by_row(merged).items()]
    rows_of = {row.keys: [one for key in row.keys for one in beside.get(key, ())] for row in drafts}
    scopes = {row.scope for row in drafts if row.scope}
    usual = next(iter(scopes)) if len(scopes) == 1 else DEFAULT_SCOPE
    blocks = [
        _block(drafts, rows_of, scope, some)
        for scope in sorted(scopes or {DEFAULT_SCOPE}, key=lambda s: (s != usual, s))
        for some in split([r for r in drafts if (r.scope or usual) == scope and r.kind != CONTROL] or drafts, metric)
    ]
    columns = {task: m.metric for row in drafts for task, m in row.values.items()}
    return Board(
        model, about(records), columns, tuple(blocks),
        (*notes, *seeds.remark(together), *_versions(records), *problems, *unlike(row.speed for row in drafts)),
    )  # fmt: skip


def about(records: Sequence[Record]) -> str:
    """Return the cells' dtype and hardware, if they share one: `bfloat16, 2 CPU threads`."""
    last = max(records, key=lambda r: r.created)
    dtypes = {str(r.inputs["dtype"]) for r in records if r.inputs.get("dtype")}
    threads = last.environment.get("threads")
    cpu = f"{threads} CPU thread{'s' if threads != '1' else ''}" if threads else str(last.inputs.get("device", ""))
    return ", ".join(filter(None, [*(dtypes if len(dtypes) == 1 else ()), last.environment.get("gpu") or cpu]))


def _versions(records: Sequence[Record]) -> list[str]:
    """Return a remark if the cells come from several versions of the code."""
    codes = Counter(str(r.inputs["code"])[:8] for r in records if r.inputs.get("code"))
    each = ", ".join(f"{count} of {code}" for code, count in codes.most_common())
    return [f"The cells come from {len(codes)} versions of the code: {each}."] if len(codes) > 1 else []


def main_metrics(record: Record, metric: str | None = None) -> list[Metric]:
    """Return the main metric of each requested task, without members of groups.

    Args:
        record: of a cell.
        metric: replaces the main metric of tasks that have it.
    """
    found = [m for m in record.metrics if m.part_of is None]
    asked = {m.task: m for m in reversed(found) if m.metric.partition(",")[0] == metric}  # its first filter, as `main`
    return [asked.get(m.task, m) for m in metrics.main(found)]


def _row(label: str, records: Sequence[Record], speeds: Sequence[Speed], metric: str | None) -> BoardRow:
    """Return a row without its quality."""
    first = records[0]
    last_bits = first.settings.get("granularity") == LAST_BITS
    kind = UPPER_BOUND if first.settings.get("upper_bound") else PRUNED
    if first.inputs["method"] == DENSE or last_bits:
        kind = ROUNDING if first.inputs.get("ffn_bits") or last_bits else CONTROL
    return BoardRow(
        label=label, name=label, sparsity=float(first.inputs["sparsity"]), kind=kind,
        read=sum(r.weights_read for r in records) / len(records),
        scope=str(first.inputs["scope"]) if inputs.matters("scope", first.inputs) else None,
        values={m.task: m for r in records for m in main_metrics(r, metric)},
        asked={m.task: inputs.question(r.inputs, [*inputs.UNLIKE_DENSE, "seed"])
               for r in records for m in main_metrics(r, metric)},
        memory=max((r.memory["beside"] for r in records if "beside" in r.memory), default=None),
        overhead=sum(r.flops.get("overhead_share", 0.0) for r in records) / len(records),
        calibrated=first.inputs.get("calibration") is not None, speed=of_cell(speeds, first.inputs),
        keys=tuple(r.key for r in records), about=any(r.settings.get("about") for r in records),
    )  # fmt: skip


def _block(
    drafts: Sequence[BoardRow], beside: Mapping[tuple[str, ...], Sequence[Compared]], scope: str,
    block: tuple[Tasks, Sequence[BoardRow]],
) -> Block:  # fmt: skip
    """Return a block: its rows with their quality, and all other rows that ran its tasks at their reads.

    Args:
        drafts: all rows of the board.
        beside: keys of a row -> its metrics beside dense's.
        scope: of the block.
        block: its tasks, and the rows that have no other block.
    """
    tasks, own = block
    first = next(iter(tasks), "")
    needed = {question for question in own[0].questions if question[0] in tasks.get(first, ())}
    reads = [row.read for row in own]
    others = [
        row for row in drafts
        if row not in own and needed and needed <= {*row.questions}
        and row.scope in (None, scope)
        and (row.kind in (CONTROL, ROUNDING) or any(abs(row.read - read) <= WIDTH_OF_LEVEL for read in reads))
    ]  # fmt: skip
    found = {row.keys: beside.get(row.keys, ()) for row in [*own, *others]}
    rows = [replace(row, quality=qualities(row.values, found[row.keys], tasks)) for row in [*own, *others]]
    means = [_means(found, name, tasks if name == "kl" else {first: tasks.get(first, ())})
             for name in (metrics.GOLD, "flips", "kl")]  # fmt: skip
    rows = [replace(row, nats=means[0][row.keys], flips=means[1][row.keys], kl=means[2][row.keys]) for row in rows]
    ours = {(one.measure.task, one.measure.name): one for some in found.values() for one in some}
    choice = {m: [ours[t, m] for t in tasks[m] if (t, m) in ours] for m in tasks if metrics.kind_of(m).chance}
    at_chance = [one.measure.task for some in choice.values() for one in some
                 if one.chance and len(one.sides[1].units) >= stats.MIN_CLUSTERS
                 and not above_zero(one.sides[1])]  # fmt: skip
    levels = _levels(rows, first)
    if levels and levels[0][0].kind == CONTROL:
        levels[0] += _guessing(choice)
    rounded = [row for row in rows if row.kind == ROUNDING]
    judged = tuple(verdict.judged(level, rounded, first) for level in levels)
    return Block(tasks, scope, judged, tuple(sorted(at_chance)))


def _means(
    by_row: Mapping[tuple[str, ...], Sequence[Compared]], name: str, tasks: Tasks
) -> dict[tuple[str, ...], Estimate | None]:
    """Return the mean of a metric over tasks, by a row's keys; None for rows that lack a task of another row.

    Log-likelihoods are relative to dense's. KL of pruners on rounded weights is left out, as it is relative to these.
    """
    within = {task for some in tasks.values() for task in some}
    own = {
        keys: {one.measure.task: one.lost.times(-1) if name == metrics.GOLD else one.sides[0] for one in some
               if one.measure.name == name and one.measure.task in within
               and not (name == "kl" and one.a.inputs.get("ffn_bits"))}
        for keys, some in by_row.items()
    }  # fmt: skip
    known = {task for some in own.values() for task in some}
    return {keys: mean(some.values()) if some.keys() == known else None for keys, some in own.items()}


def _guessing(choice: Mapping[str, Sequence[Compared]]) -> list[BoardRow]:
    """Return the row of an answerer that guesses; none without choice tasks.

    Args:
        choice: accuracy -> a row of each of its tasks.
    """
    quality = {}
    for metric, rows in choice.items():
        chances = [one.chance for one in rows if one.chance is not None]
        if len(chances) == len(rows) and any(chances):
            quality[metric] = Quality(sum(chances) / len(chances), None, None, NOTHING)
    return [BoardRow(GUESSING, GUESSING, 0.0, 1.0, GUESSING, quality=quality)] if quality else []


def _levels(rows: Sequence[BoardRow], first: str | None) -> list[list[BoardRow]]:
    """Return rows in levels of equal read, the highest first; inside a level by quality, upper bounds first.

    The most frequent read absorbs the rows around it, then the most frequent read of the others, and so on.
    """
    rest = [row for row in rows if row.kind != CONTROL]
    found = [level for level in [[row for row in rows if row.kind == CONTROL]] if level]
    while rest:
        counts = Counter(round(row.read, 2) for row in rest)
        anchor = max(counts, key=lambda read: (counts[read], read))
        found.append([row for row in rest if round(abs(row.read - anchor), 4) <= WIDTH_OF_LEVEL])
        rest = [row for row in rest if row not in found[-1]]
    order = {CONTROL: 0, UPPER_BOUND: 1}
    sorted_ones = [
        sorted(_named(level), key=lambda r: (order.get(r.kind, 2), *verdict.place(r, first), r.label))
        for level in found
    ]  # fmt: skip
    return sorted(sorted_ones, key=lambda level: (level[0].kind != CONTROL, -max(r.read for r in level)))


def _named(level: Iterable[BoardRow]) -> list[BoardRow]:
    """Name the rows of a level, with their sparsity if it does not follow from the level."""
    rows = list(level)
    several = len({row.sparsity for row in rows if row.kind in (PRUNED, UPPER_BOUND)}) > 1

    def name(row: BoardRow) -> str:
        named = row.sparsity > 0 and (several or abs(1 - row.read - row.sparsity) >= WIDTH_OF_LEVEL)
        return f"{row.label} {sparsity(row.sparsity)}" if named else row.label

    return [replace(row, name=name(row)) for row in rows]
