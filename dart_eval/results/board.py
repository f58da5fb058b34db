"""The board: one row a method and sparsity, best first, with what it keeps of dense and what it costs.

Rows stand in levels of one scope and equal read (FFN weight bytes that a decoded token reads / those of the dense FFN).
Rows that leave out something else than neurons stand in levels of their own, after the others. Inside a level they are
ordered by mean recovery. The best pruned row is tested against every other one on the same documents; it was chosen by
the values that are then tested, so each p counts for all pairs that could have been chosen (K / 2 for each of the K - 1
that are tested), and Holm's correction is taken over them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dart_eval.bench.kept import Speed, of_cell
from dart_eval.bits import LAST_BITS
from dart_eval.errors import UserError
from dart_eval.results import inputs, metrics, outcomes, pairing, recovery, stats
from dart_eval.results.format import sparsity
from dart_eval.results.inputs import DENSE
from dart_eval.results.labels import labels
from dart_eval.results.outcomes import Measure
from dart_eval.results.record import Metric, Record
from dart_eval.results.recovery import Recovery
from dart_eval.results.store import Store

MOST_NAMED = 4  # rows that a sentence names
WIDTH_OF_LEVEL = 0.02  # reads that differ by less stand in one level
PRUNED, UPPER_BOUND, CONTROL, ROUNDING = "pruned", "upper bound", "control", "rounding alone"
BEST, LEVEL_WITH_BEST = "best", "not told apart"
USUAL = "scored"  # the scope that goes without saying


@dataclass(frozen=True)
class Row:
    """A method at a sparsity.

    Attributes:
        label: the method, and what else tells the row apart. name: the same for people, with the sparsity where the
            level does not name it. sparsity: None where it does not decide what is read.
        kind: `pruned`, `upper bound`, `control` (dense), `rounding alone` (dense on rounded weights, or on their
            first bits), or what is left out in place of neurons.
        read: of the FFN weights of dense, mean over the cells.
        scope: which positions ran pruned; None of dense, rounded or not, which is the same in all of them.
        values: task -> its main metric.
        recovery: mean over the tasks that have one. tasks: these.
        nats: log-likelihood of the right answers of choice tasks less that under dense, mean over tasks.
        memory: bytes kept beside the model, the most over the cells.
        overhead: FLOPs that the method adds to a decoded token / FLOPs of a dense one, mean over the cells.
        calibrated: it has read a text before any prompt.
        speed: of decoding, where `bench` wrote one into the folder, or that no kernel makes its bytes into time.
        mark: `best` of its level, `not told apart` from it, or empty.
        keys: of the records.
    """

    label: str
    name: str
    sparsity: float | None
    kind: str
    scope: str | None
    read: float
    values: dict[str, Metric]
    recovery: Recovery | None
    tasks: tuple[str, ...]
    nats: Recovery | None
    memory: int
    overhead: float
    calibrated: bool
    speed: Speed | None
    keys: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class Level:
    """Rows of one read, best first, and the sentence that says which was best and whether that is more than noise.

    rounding_wins: rounding alone keeps more than any pruned row, and that is more than noise.
    """

    rows: tuple[Row, ...]
    verdict: str = ""
    rounding_wins: bool = False


@dataclass(frozen=True)
class Board:
    """The board of one model.

    Attributes:
        columns: task -> name of its main metric, in the order of the columns.
        notes: what a reader must know beside the numbers.
    """

    model: str
    columns: dict[str, str]
    levels: tuple[Level, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows of all levels, from the top of the board to its end."""
        return [row for level in self.levels for row in level.rows]


Kept = dict[str, list[tuple[Measure, Recovery]]]  # key of a record -> what its cell keeps of dense
Contest = dict[tuple[str, ...], float | None]  # keys of a row -> adjusted p of the best one against it


def boards(store: Store, records: Sequence[Record], speeds: Sequence[Speed] = ()) -> list[Board]:
    """One board for each model of a folder.

    Args:
        store: the folder, for samples. records: its cells. speeds: what `bench decode` wrote into it.
    """
    kept, older = newest(records)
    by_model: dict[str, list[Record]] = {}
    for r in kept:
        by_model.setdefault(inputs.model_of(r.inputs["model"]), []).append(r)
    same_name = len({r.inputs["model"]["name"] for r in kept}) < len(by_model)
    notes = [f"{older} cells of older runs are left out: the last run of each counts."] if older else []
    return [
        _board(
            store, model if same_name else found[0].inputs["model"]["name"], found, speeds, [*notes, *_versions(found)]
        )
        for model, found in sorted(by_model.items())
    ]


def _versions(records: Sequence[Record]) -> list[str]:
    """A remark where cells were made by several versions of the code."""
    codes = Counter(str(r.inputs["code"])[:8] for r in records if r.inputs.get("code"))
    each = ", ".join(f"{count} of {code}" for code, count in codes.most_common())
    return [f"The cells are of {len(codes)} versions of the code: {each}."] if len(codes) > 1 else []


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Of cells that were asked the same on the same dtype and device the one finished last; how many were left out."""
    last: dict[str, Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.key)):
        last[inputs.question(r.inputs, [] if inputs.matters("scope", r.inputs) else ["scope"])] = r
    kept = {r.key for r in last.values()}
    return [r for r in records if r.key in kept], len(records) - len(kept)


def _board(store: Store, model: str, records: Sequence[Record], speeds: Sequence[Speed], notes: Sequence[str]) -> Board:
    names = labels(records, by_task=True)
    groups: dict[tuple[str, float], list[Record]] = {}
    columns: dict[str, str] = {}
    for r in sorted(records, key=lambda r: str(r.inputs["task"])):
        for m in main_metrics(r):
            columns.setdefault(m.task, m.metric)
        groups.setdefault((names[r.key], float(r.inputs["sparsity"])), []).append(r)
    kept, problems = _recoveries(store, [r for group in groups.values() for r in group])
    order = {name: i for i, name in enumerate(metrics.METRICS)}
    tasks = sorted(columns, key=lambda t: (order.get(columns[t].partition(",")[0], len(order)), t))
    rows = [_row(label, group, kept, speeds) for (label, _), group in groups.items()]
    return Board(model, {t: columns[t] for t in tasks}, _judged_levels(_levels(rows)), (*notes, *problems))


def main_metrics(record: Record) -> list[Metric]:
    """The one number of each task that was asked for: members of groups stay out."""
    return metrics.main(m for m in record.metrics if m.part_of is None)


def _recoveries(store: Store, records: Iterable[Record]) -> tuple[Kept, list[str]]:
    """What the cells keep of their dense ones, and why some of it is missing."""
    cells = [outcomes.cell_of(store, r) for r in records]
    dense = pairing.dense_cells(cells)
    kept: Kept = {}
    problems: dict[str, None] = {}
    alone: dict[str, None] = {}
    for cell in cells:
        reference = pairing.dense_of(cell, dense)
        if reference is None:
            alone[str(cell.inputs["task"])] = None
        elif reference is not cell:
            try:
                found = pairing.pair(cell, reference)
            except UserError as error:
                problems[f"Without a recovery: {error.problem}."] = None
                continue
            main = metrics.main(found.x.measures)
            for m in (m for m in found.x.measures if m in main or m.name == metrics.GOLD):
                values = found.values(m)
                made = None if values is None else recovery.of_task(values)
                if made is not None:
                    kept.setdefault(cell.key, []).append((m, made))
                elif m in main:
                    problems[f"{m.task} is not in the recovery: dense has no {m.metric} above 0."] = None
    if alone:
        problems[f"There is no dense cell for {', '.join(alone)}: run --method dense too, for recoveries."] = None
    return kept, list(problems)


def _row(label: str, records: Sequence[Record], kept: Kept, speeds: Sequence[Speed]) -> Row:
    first = records[0]
    dense, rounded = first.inputs["method"] == DENSE, bool(first.inputs.get("ffn_bits"))
    kind = UPPER_BOUND if first.settings.get("upper_bound") else first.settings.get("granularity", PRUNED)
    if dense or kind == LAST_BITS:
        kind = ROUNDING if rounded or not dense else CONTROL
    sized = kind == CONTROL or abs(1 - first.weights_read - first.inputs["sparsity"]) < 0.05
    found = [one for r in records for one in kept.get(r.key, ())]
    recoveries = {m.task: made for m, made in found if m.name != metrics.GOLD}
    nats = {m.task: made for m, made in found if m.name == metrics.GOLD}
    unsaid = f" {sparsity(first.inputs['sparsity'])}" if first.inputs["sparsity"] and not sized else ""
    return Row(
        label=label, name=label + unsaid, sparsity=float(first.inputs["sparsity"]) if sized else None, kind=kind,
        scope=str(first.inputs["scope"]) if inputs.matters("scope", first.inputs) else None,
        read=sum(r.weights_read for r in records) / len(records),
        values={m.task: m for r in records for m in main_metrics(r)},
        recovery=recovery.mean(recoveries.values()), tasks=tuple(sorted(recoveries)), nats=recovery.mean(nats.values()),
        memory=max(r.memory.get("state", 0) for r in records),
        overhead=sum(r.flops.get("overhead_share", 0.0) for r in records) / len(records),
        calibrated=first.inputs.get("calibration") is not None, speed=of_cell(speeds, first.inputs),
        keys=tuple(r.key for r in records),
    )  # fmt: skip


def _levels(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in levels of one scope and equal read, the highest read first; another granularity comes after all others.

    Inside a level upper bounds come first, then pruned rows by recovery, those that lack a task of the others last.
    """
    scopes = {row.scope for row in rows if row.scope}
    usual = next(iter(scopes)) if len(scopes) == 1 else USUAL  # where rows stand that are the same in all of them

    def of(row: Row) -> tuple[str, bool, bool, str]:
        """What levels are kept apart by: granularity, dense, scope (ours first)."""
        scope = row.scope or usual
        return granularity(row), row.kind != CONTROL, scope != USUAL, scope

    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: (*of(r), -r.read)):
        level = found[-1] if found else None
        if level and abs(level[0].read - row.read) <= WIDTH_OF_LEVEL and of(level[0]) == of(row):
            level.append(row)
        else:
            found.append([row])
    return [sorted(_named(level), key=partial(_place, _all_tasks(level))) for level in found]


def _named(level: Sequence[Row]) -> list[Row]:
    """The rows of a level; where it has several sparsities, each row says its own in place of the level."""
    if len({row.sparsity for row in level} - {None}) < 2:
        return list(level)
    return [
        row if row.sparsity is None else replace(row, name=f"{row.label} {sparsity(row.sparsity)}") for row in level
    ]


def granularity(row: Row) -> str:
    """What a row leaves out; nothing where it is neurons."""
    return "" if row.kind in (PRUNED, UPPER_BOUND, CONTROL, ROUNDING) else row.kind


def _place(everything: tuple[str, ...], row: Row) -> tuple[Any, ...]:
    """What rows of a level are sorted by; everything: the level's tasks."""
    order = {CONTROL: 0, UPPER_BOUND: 1, PRUNED: 2, ROUNDING: 2}
    return (
        order.get(row.kind, len(order)),
        row.tasks != everything,
        -(row.recovery.value if row.recovery else -1.0),
        row.label,
    )


def _all_tasks(level: Sequence[Row]) -> tuple[str, ...]:
    """The tasks on which any pruned row of a level has a recovery."""
    return tuple(sorted({task for row in level if row.kind == PRUNED for task in row.tasks}))


def _judged_levels(levels: Sequence[Sequence[Row]]) -> tuple[Level, ...]:
    """The levels with their marks and sentences."""
    rounded = [row for level in levels for row in level if row.kind == ROUNDING]
    return tuple(_judged(level, rounded) for level in levels)


def _judged(rows: Sequence[Row], every: Sequence[Row]) -> Level:
    """The level with its marks and its sentences. A row that lacks a task of the others takes no part in the test.

    Args:
        every: the rows of rounding alone, of all levels: of those that read no more than this one the best counts.
    """
    scope = next((r.scope for r in rows if r.scope), None)
    if all(r.kind == PRUNED and r.read >= 1 for r in rows):
        return Level(tuple(rows), f"Nothing ran pruned under scope {scope}: its rows are dense.")
    every = [r for r in every if r.scope in (None, scope)]
    rivals = [r for r in rows if r.kind == PRUNED and r.tasks and r.tasks == _all_tasks(rows)]
    most = max(r.read for r in rows) + WIDTH_OF_LEVEL
    fitting = [r for r in every if rivals and r.tasks == rivals[0].tasks and r.read <= most and r.recovery]
    rounded = sorted(fitting, key=lambda r: -r.recovery.value if r.recovery else 0.0)[:1]
    if len(rivals) + len(rounded) < 2 or not rivals:
        return Level(tuple(rows))
    contest = _contest([(r, r.recovery) for r in rivals])
    marks = {keys: "" if _told(p) else LEVEL_WITH_BEST for keys, p in contest.items()}
    marks |= {rivals[0].keys: BEST} if len(rivals) > 1 else {}
    said = [_sentence(rivals[0], rivals[1:], contest)]
    if not all(map(_told, contest.values())):
        said += _by_likelihood(rivals)
    against = [
        _against_rounding(rivals[0], r, _contest([(rivals[0], rivals[0].recovery), (r, r.recovery)])) for r in rounded
    ]
    said += [sentence for sentence, _ in against]
    marked = tuple(replace(r, mark=marks.get(r.keys, "")) for r in rows)
    return Level(marked, " ".join(said), any(wins for _, wins in against))


def _against_rounding(best: Row, rounded: Row, contest: Contest) -> tuple[str, bool]:
    """What the best pruned row is beside rounding alone, and whether rounding wins."""
    assert best.recovery is not None and rounded.recovery is not None
    what = f"rounding alone ({rounded.name}, read {rounded.read:.2f}) keeps {100 * rounded.recovery.value:.0f} %"
    if not _told(contest[rounded.keys]):
        return f"{what[0].upper()}{what[1:]}: no difference that is more than noise.", False
    bound = _bound([rounded], contest)
    if best.recovery.value > rounded.recovery.value:
        return f"{what[0].upper()}{what[1:]}, less than that, and it is more than noise ({bound}).", False
    return f"{what[0].upper()}{what[1:]}, more than that, and it is more than noise ({bound}).", True


def _contest(rivals: Sequence[tuple[Row, Recovery | None]]) -> Contest:
    """Adjusted p of the first of some rows against each of the others."""
    (_, best), *others = rivals
    tested = [recovery.difference(best, other) if best and other else None for _, other in others]
    counted = [None if p is None else min(1.0, len(rivals) / 2 * p) for p in tested]
    return {r.keys: p for (r, _), p in zip(others, stats.holm(counted), strict=True)}


def _told(p: float | None) -> bool:
    return p is not None and p < stats.ALPHA


def _by_likelihood(rivals: Sequence[Row]) -> list[str]:
    """What the likelihood of right answers says where the recovery does not tell all rows apart.

    It needs fewer documents than an accuracy.
    """
    ranked = sorted(((r, r.nats) for r in rivals if r.nats), key=lambda one: -one[1].value)
    if len(ranked) < 2:
        return []
    contest = _contest(ranked)
    behind = [r for r, _ in ranked[1:] if _told(contest[r.keys])]
    if not behind:
        return []
    against = f"{_others(behind, len(ranked) - 1)} ({_bound(behind, contest)})"
    return [f"By the log-likelihood of right answers {ranked[0][0].name} is better than {against}."]


def _others(rows: Sequence[Row], of: int) -> str:
    return "all other pruned rows" if len(rows) == of > 1 else _listed([r.name for r in rows])


def _bound(rows: Sequence[Row], contest: Contest) -> str:
    """`paired, Holm p < .01`, of the largest p."""
    highest = max(p for r in rows if (p := contest[r.keys]) is not None)
    return f"paired, Holm p < {next(limit for limit in (1e-3, 0.01, stats.ALPHA) if highest < limit):g}"


def _sentence(best: Row, others: Sequence[Row], contest: Contest) -> str:
    """`At read 0.30 dart-plus keeps the most ...`, with what the paired tests say."""
    assert best.recovery is not None
    behind = [r for r in others if _told(contest[r.keys])]
    level = [r for r in others if r not in behind]
    text = f"At read {best.read:.2f} {best.name} keeps the most of dense's quality: {100 * best.recovery.value:.0f} %."
    if not others:
        return text
    if not behind:
        return f"{text} Its lead over {_listed([r.name for r in level])} may be noise (paired test)."
    text += f" Its lead over {_others(behind, len(others))} is more than noise ({_bound(behind, contest)})"
    return f"{text}; its lead over {_listed([r.name for r in level])} may be noise." if level else f"{text}."


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        return f"{len(names)} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
