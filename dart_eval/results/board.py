"""The board: one row a method and sparsity, in levels of the FFN bytes that a decoded token reads.

Rows of one block have run on the same tasks; rows that lack some of them stand in a block of their own. No mean goes
over two metrics. The first row of a level is tested against every other one on the same documents; it was chosen by the
values that are then tested, so each p counts for all pairs that could have been chosen (`verdict.stand_of`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dart_eval.results import frame, inputs, metrics, outcomes, verdict
from dart_eval.results.blocks import (
    CONTROL,
    GUESSING,
    PRUNED,
    ROUNDING,
    UPPER_BOUND,
    USUAL,
    WIDTH_OF_LEVEL,
    Block,
    Board,
    Level,
    Quality,
    Row,
    Tasks,
    qualities,
    split,
)
from dart_eval.results.estimates import Estimate, Share, above_zero, mean
from dart_eval.results.format import sparsity
from dart_eval.results.frame import Compared
from dart_eval.results.inputs import DENSE
from dart_eval.results.labels import labels
from dart_eval.results.record import Metric, Record
from dart_eval.results.speeds import Speed, of_cell
from dart_eval.results.store import Store
from dart_eval.util.bits import LAST_BITS

NOTHING = Share(0.0, (0.0, 0.0))  # of what dense has above guessing: guessing, by definition


def boards(
    store: Store, records: Sequence[Record], speeds: Sequence[Speed] = (), metric: str | None = None
) -> list[Board]:
    """One board for each model of a folder.

    Args:
        store: the folder, for samples. records: its cells. speeds: what `bench decode` wrote into it.
        metric: shown in place of the main one, of tasks that have it.
    """
    kept, older = newest(records)
    by_model: dict[str, list[Record]] = {}
    for r in kept:
        by_model.setdefault(inputs.model_of(r.inputs["model"]), []).append(r)
    same_name = len({r.inputs["model"]["name"] for r in kept}) < len(by_model)
    notes = [f"Left out: {older} older run{'s' * (older > 1)} of cells. The last run of each counts."] if older else []
    return [
        _board(store, model if same_name else found[0].inputs["model"]["name"], found, speeds, notes, metric)
        for model, found in sorted(by_model.items())
    ]


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Of cells that were asked the same on the same dtype and device the one finished last; how many were left out."""
    last: dict[str, Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.key)):
        last[inputs.question(r.inputs, [] if inputs.matters("scope", r.inputs) else ["scope"])] = r
    kept = {r.key for r in last.values()}
    return [r for r in records if r.key in kept], len(records) - len(kept)


def _board(
    store: Store, model: str, records: Sequence[Record], speeds: Sequence[Speed], notes: Sequence[str],
    metric: str | None,
) -> Board:  # fmt: skip
    names = labels(records, by_task=True)
    groups: dict[tuple[str, float], list[Record]] = {}
    for r in sorted(records, key=lambda r: str(r.inputs["task"])):
        groups.setdefault((names[r.key], float(r.inputs["sparsity"])), []).append(r)
    beside, problems = frame.beside_dense([outcomes.cell_of(store, r) for r in records])
    drafts = [_row(label, group, speeds, metric) for (label, _), group in groups.items()]
    rows_of = {row.keys: [one for key in row.keys for one in beside.get(key, ())] for row in drafts}
    scopes = {row.scope for row in drafts if row.scope}
    usual = next(iter(scopes)) if len(scopes) == 1 else USUAL
    blocks = [
        _block(drafts, rows_of, scope, some)
        for scope in sorted(scopes or {USUAL}, key=lambda s: (s != usual, s))
        for some in split([r for r in drafts if (r.scope or usual) == scope and r.kind != CONTROL] or drafts, metric)
    ]
    columns = {task: m.metric for row in drafts for task, m in row.values.items()}
    return Board(model, about(records), columns, tuple(blocks), (*notes, *_versions(records), *problems))


def about(records: Sequence[Record]) -> str:
    """`bfloat16, 2 CPU threads`: what the cells ran on, where that is one."""
    last = max(records, key=lambda r: r.created)
    dtypes = {str(r.inputs["dtype"]) for r in records if r.inputs.get("dtype")}
    threads = last.environment.get("threads")
    cpu = f"{threads} CPU thread{'s' if threads != '1' else ''}" if threads else str(last.inputs.get("device", ""))
    return ", ".join(filter(None, [*(dtypes if len(dtypes) == 1 else ()), last.environment.get("gpu") or cpu]))


def _versions(records: Sequence[Record]) -> list[str]:
    """A remark where cells were made by several versions of the code."""
    codes = Counter(str(r.inputs["code"])[:8] for r in records if r.inputs.get("code"))
    each = ", ".join(f"{count} of {code}" for code, count in codes.most_common())
    return [f"The cells come from {len(codes)} versions of the code: {each}."] if len(codes) > 1 else []


def main_metrics(record: Record, metric: str | None = None) -> list[Metric]:
    """The one number of each task that was asked for: members of groups stay out.

    Args:
        record: of a cell. metric: to take where a task has it, in place of its main one.
    """
    found = [m for m in record.metrics if m.part_of is None]
    asked = {m.task: m for m in found if m.metric.partition(",")[0] == metric}
    return [asked.get(m.task, m) for m in metrics.main(found)]


def _row(label: str, records: Sequence[Record], speeds: Sequence[Speed], metric: str | None) -> Row:
    """A row without its quality."""
    first = records[0]
    last_bits = first.settings.get("granularity") == LAST_BITS
    kind = UPPER_BOUND if first.settings.get("upper_bound") else PRUNED
    if first.inputs["method"] == DENSE or last_bits:
        kind = ROUNDING if first.inputs.get("ffn_bits") or last_bits else CONTROL
    return Row(
        label=label, name=label, sparsity=float(first.inputs["sparsity"]), kind=kind,
        read=sum(r.weights_read for r in records) / len(records),
        scope=str(first.inputs["scope"]) if inputs.matters("scope", first.inputs) else None,
        values={m.task: m for r in records for m in main_metrics(r, metric)},
        memory=max(r.memory.get("state", 0) for r in records),
        overhead=sum(r.flops.get("overhead_share", 0.0) for r in records) / len(records),
        calibrated=first.inputs.get("calibration") is not None, speed=of_cell(speeds, first.inputs),
        keys=tuple(r.key for r in records),
    )  # fmt: skip


def _block(
    drafts: Sequence[Row], beside: Mapping[tuple[str, ...], Sequence[Compared]], scope: str,
    block: tuple[Tasks, Sequence[Row]],
) -> Block:  # fmt: skip
    """The rows of a block with their quality on its tasks, beside all others that have run these tasks at their reads.

    Args:
        drafts: all rows of the board. beside: keys of a row -> its metrics beside dense's. scope: of the block.
        block: its tasks, and the rows that have no other block.
    """
    tasks, own = block
    first = next(iter(tasks), "")
    needed = set(tasks.get(first, ()))
    reads = [row.read for row in own]
    others = [
        row for row in drafts
        if row not in own and needed and needed <= row.values.keys() and row.scope in (None, scope)
        and (row.kind in (CONTROL, ROUNDING) or any(abs(row.read - read) <= WIDTH_OF_LEVEL for read in reads))
    ]  # fmt: skip
    found = {row.keys: beside.get(row.keys, ()) for row in [*own, *others]}
    rows = [replace(row, quality=qualities(row.values, found[row.keys], tasks)) for row in [*own, *others]]
    means = [_means(found, name, tasks if name == "kl" else {first: tasks.get(first, ())})
             for name in (metrics.GOLD, "flips", "kl")]  # fmt: skip
    rows = [replace(row, nats=means[0][row.keys], flips=means[1][row.keys], kl=means[2][row.keys]) for row in rows]
    ours = {(one.measure.task, one.measure.name): one for some in beside.values() for one in some}
    choice = {m: [ours[t, m] for t in tasks[m] if (t, m) in ours] for m in tasks if metrics.kind_of(m).chance}
    at_chance = [one.measure.task for some in choice.values() for one in some
                 if one.chance and not above_zero(one.sides[1])]  # fmt: skip
    levels = _levels(rows, first)
    if levels and levels[0][0].kind == CONTROL:
        levels[0] += _guessing(choice)
    rounded = [row for row in rows if row.kind == ROUNDING]
    judged = tuple(Level(*verdict.judged(level, rounded, first)) for level in levels)
    return Block(tasks, scope, judged, tuple(sorted(at_chance)))


def _means(
    found: Mapping[tuple[str, ...], Sequence[Compared]], name: str, tasks: Tasks
) -> dict[tuple[str, ...], Estimate | None]:
    """The mean of a metric over tasks, by the keys of a row; None of rows that lack a task which another one has.

    Of log-likelihoods it is what they are above dense's. Pruners on rounded weights diverge from these: not shown.
    """
    within = {task for some in tasks.values() for task in some}
    own = {
        keys: [one.lost.times(-1) if name == metrics.GOLD else one.sides[0] for one in some
               if one.measure.name == name and one.measure.task in within
               and not (name == "kl" and one.a.inputs.get("ffn_bits"))]
        for keys, some in found.items()
    }  # fmt: skip
    most = max(map(len, own.values()), default=0)
    return {keys: mean(some) if len(some) == most else None for keys, some in own.items()}


def _guessing(choice: Mapping[str, Sequence[Compared]]) -> list[Row]:
    """The row of an answerer that guesses; none where no task is a choice.

    Args:
        choice: accuracy -> a row of each of its tasks.
    """
    quality = {}
    for metric, rows in choice.items():
        chances = [one.chance for one in rows if one.chance is not None]
        if len(chances) == len(rows) and any(chances):
            quality[metric] = Quality(sum(chances) / len(chances), None, None, NOTHING)
    return [Row(GUESSING, GUESSING, 0.0, 1.0, GUESSING, quality=quality)] if quality else []


def _levels(rows: Sequence[Row], first: str | None) -> list[list[Row]]:
    """Rows in levels of equal read, the highest first; inside a level by quality, upper bounds first.

    The read that most rows have takes in those around it, then the read that most of the others have, and so on.
    """
    left = [row for row in rows if row.kind != CONTROL]
    found = [level for level in [[row for row in rows if row.kind == CONTROL]] if level]
    while left:
        counts = Counter(round(row.read, 2) for row in left)
        anchor = max(counts, key=lambda read: (counts[read], read))
        found.append([row for row in left if round(abs(row.read - anchor), 4) <= WIDTH_OF_LEVEL])
        left = [row for row in left if row not in found[-1]]
    order = {CONTROL: 0, UPPER_BOUND: 1}
    sorted_ones = [
        sorted(_named(level), key=lambda r: (order.get(r.kind, 2), *verdict.place(r, first), r.label))
        for level in found
    ]  # fmt: skip
    return sorted(sorted_ones, key=lambda level: (level[0].kind != CONTROL, -max(r.read for r in level)))


def _named(level: Iterable[Row]) -> list[Row]:
    """The rows of a level, each with its sparsity where that does not follow from the level."""
    rows = list(level)
    several = len({row.sparsity for row in rows if row.kind in (PRUNED, UPPER_BOUND)}) > 1

    def name(row: Row) -> str:
        said = row.sparsity > 0 and (several or abs(1 - row.read - row.sparsity) >= WIDTH_OF_LEVEL)
        return f"{row.label} {sparsity(row.sparsity)}" if said else row.label

    return [replace(row, name=name(row)) for row in rows]
