"""The board: one row a method and sparsity, in levels of the FFN bytes that a decoded token reads.

Rows of one block have run on the same tasks; rows that lack some of them are in a block of their own. No mean combines
two metrics. Cells that differ in their seed alone are one row, their mean; errors are over documents.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from dart_eval.results import inputs, metrics, speeds, stats
from dart_eval.results.documents import Compared
from dart_eval.results.frame import beside_dense, cell_of, with_distances
from dart_eval.results.inputs import CALIBRATED, DENSE, NOISE, grouped, identity, labels, matters, model_of, question
from dart_eval.results.metrics import asked
from dart_eval.results.record import Metric, Record
from dart_eval.results.speeds import Speed
from dart_eval.results.stats import Estimate, Share, above_zero, share
from dart_eval.results.store import Store
from dart_eval.util.bits import LAST_BITS
from dart_eval.util.errors import UserError, nearest

Tasks = Mapping[str, tuple[str, ...]]  # metric -> its tasks in a block
WIDTH_OF_LEVEL = 0.02  # reads that differ by less are one level
# Kinds of rows. A control is dense, noise (`NOISE`) its floor; rounding is dense on rounded weights, or on their first
# bits.
PRUNED, UPPER_BOUND, CONTROL, ROUNDING, GUESSING = "pruned", "upper bound", "control", "rounding", "guessing"
DEFAULT_SCOPE = "scored"  # not named on the board
MATTERS = 0.005  # half a point of an accuracy, .005 nats a word or an answer: a smaller lead is no reason to pay more
AHEAD, BEHIND, TIED, SPLIT, UNTESTED = "ahead", "behind", "tied", "split", "untested"
NOTHING = Share(0.0, (0.0, 0.0))  # share of guessing in dense's quality above guessing


class Quality(NamedTuple):
    """One metric of a row, as the mean over the tasks of its block."""

    value: float  # mean of the records' values
    stderr: float | None
    better: Estimate | None = None  # quality minus dense's, higher is better; of perplexities -log(quality / dense)
    share: Share | None = None  # quality above chance / that of dense, summed over tasks; None where dense's is noise

    def beside_dense(self, metric: str) -> Share | None:
        """Return the share, of a perplexity the multiple of dense's (geometric mean over tasks), with its interval."""
        if metrics.kind_of(metric).group != metrics.PERPLEXITY:
            return self.share
        return None if self.better is None else self.better.exp_minus()


@dataclass(frozen=True, eq=False)
class Row:
    """A method at a sparsity; distances and costs are means over its tasks or cells."""

    label: str  # the method, with the settings that distinguish the row
    name: str  # the label, with the asked read if the level does not show it
    sparsity: float  # as asked for
    read: float  # bytes of FFN weights that a decoded token reads / those of dense
    kind: str
    scope: str | None = None  # which positions ran pruned; None for dense, which is the same in all scopes
    values: Mapping[str, Metric] = field(default_factory=dict)  # task -> its main metric
    asked: Mapping[str, str] = field(default_factory=dict)  # task -> equal text for equal documents and prompts
    records: Sequence[Record] = ()  # its cells, of all seeds
    compared: Sequence[Compared] = ()  # its metrics beside dense's
    quality: Mapping[str, Quality] = field(default_factory=dict)  # by metric
    nats: Estimate | None = None  # log-likelihood of the right answers minus that under dense
    flips: Estimate | None = None  # share of items whose chosen answer is not dense's
    kl: Estimate | None = None  # divergence of dense's next-token distribution to the row's, in nats
    same: Estimate | None = None  # tokens of a text before the first difference from dense's
    length: Estimate | None = None  # tokens of texts / those of dense's
    limited: Estimate | None = None  # share of texts with all the tokens that they may have
    loops: Estimate | None = None  # share of texts that repeat themselves
    overhead: float = 0.0  # FLOPs that the method adds to a decoded token / FLOPs of a dense one
    speed: Speed | None = None  # of `bench decode`, if the folder has one; it may be the lack of a kernel
    fetched: float | None = None  # the read in whole lines of 64 bytes; None where records do not know it

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its records; none of guessing."""
        return tuple(record.key for record in self.records)

    @property
    def about(self) -> bool:
        """Whether the read is about right alone, so that no test is made at equal reads."""
        return any(record.settings.get("about") for record in self.records)

    def bytes_of(self, name: str) -> int | None:
        """Return the most bytes over the cells: `beside` dense, or the `state` of a sequence; None if they lack it."""
        sizes = [record.memory[name] for record in self.records if name in record.memory]
        return max(sizes) if len(sizes) == len(self.records) and sizes else None


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that ran on the same tasks, under one scope."""

    tasks: Tasks  # of the means; the first metric orders the rows
    scope: str
    levels: tuple[tuple[Row, ...], ...]  # rows of one read, best first; the highest read first
    at_chance: tuple[str, ...] = ()  # choice tasks on which dense is not above guessing by more than noise

    @property
    def rows(self) -> list[Row]:
        """The rows of all levels, from the top to the end."""
        return [row for level in self.levels for row in level]

    @property
    def first(self) -> str:
        """The metric that orders the rows."""
        return next(iter(self.tasks), "")


@dataclass(frozen=True, eq=False)
class Board:
    """The board of one model."""

    model: str
    about: str  # dtype and hardware
    blocks: tuple[Block, ...]
    rows: tuple[Row, ...]  # with the main metrics of all their tasks
    notes: tuple[str, ...] = ()


def boards(store: Store, records: Sequence[Record], metric: str | None = None) -> list[Board]:
    """Return a board for each model of a folder, with its measured speeds.

    Args:
        store: the folder.
        records: its cells that are shown.
        metric: replaces the main metric of tasks that have it; with a filter, `exact_match,flexible-extract`.

    Raises:
        UserError: no cell has the metric.
    """
    known = {name for r in records for m in r.metrics for name in (m.metric, m.label)}
    if metric is not None and metric not in known:
        raise UserError(f"no cell has metric {metric!r}", nearest(metric, known))
    wanted = str(metric).partition(",")[0]
    current, older = newest(records)
    by_model = grouped(current, lambda r: model_of(r.inputs["model"]))
    same_name = len({r.inputs["model"]["name"] for r in current}) < len(by_model)
    notes = [f"Left out: {older} older run{'s' * (older > 1)} of cells. The last run of each counts."] if older else []
    measured = speeds.load_speeds(store.folder)
    made = []
    for model, of_model in sorted(by_model.items()):
        name = model if same_name else of_model[0].inputs["model"]["name"]
        compared, problems = beside_dense(with_distances([cell_of(store, r) for r in of_model], texts=False))
        rows = _rows(of_model, compared, measured, metric)
        scopes = {row.scope for row in rows if row.scope}
        usual = next(iter(scopes)) if len(scopes) == 1 else DEFAULT_SCOPE
        blocks = [
            _block(rows, scope, *part)
            for scope in sorted(scopes or {DEFAULT_SCOPE}, key=lambda s: (s != usual, s))
            for part in _split([r for r in rows if (r.scope or usual) == scope and r.kind != CONTROL] or rows, wanted)
        ]
        remarks = [*notes, *_remarks(of_model), *problems, *speeds.unlike(row.speed for row in rows)]
        made.append(Board(name, _about(of_model), tuple(blocks), tuple(rows), tuple(remarks)))
    return made


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Return the last of equal cells on one dtype, device and calibration, and the number of older ones."""
    last: dict[tuple[object, ...], Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.key)):
        asked = question(r.inputs, [] if matters("scope", r.inputs) else ["scope"])
        last[(asked, *map(r.inputs.get, CALIBRATED))] = r
    keys = {r.key for r in last.values()}
    return [r for r in records if r.key in keys], len(records) - len(keys)


def _remarks(records: Sequence[Record]) -> list[str]:
    """Return sentences on the seeds of means, and on versions of the code."""
    codes = Counter(str(r.inputs["code"])[:8] for r in records if r.inputs.get("code")).most_common()
    seeds = sorted({int(r.inputs.get("seed") or 0) for of in _by_seed(records) if len(of) > 1 for r in of})
    each = ", ".join(f"{count} of {code}" for code, count in codes)
    return [
        *([f"Rows are means over the seeds {', '.join(map(str, seeds))}, as far as they ran."] if seeds else []),
        *([f"The cells come from {len(codes)} versions of the code: {each}."] if len(codes) > 1 else []),
    ]


def _about(records: Sequence[Record]) -> str:
    """Return the cells' dtype and hardware, if they share one: `bfloat16, 2 CPU threads`."""
    last = max(records, key=lambda r: r.created)
    dtypes = {str(r.inputs["dtype"]) for r in records if r.inputs.get("dtype")}
    threads = last.environment.get("threads")
    cpu = f"{threads} CPU thread{'s' if threads != '1' else ''}" if threads else str(last.inputs.get("device", ""))
    return ", ".join(filter(None, [*(dtypes if len(dtypes) == 1 else ()), last.environment.get("gpu") or cpu]))


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(
    records: Sequence[Record], compared: Mapping[str, Sequence[Compared]], measured: Sequence[Speed], metric: str | None
) -> list[Row]:
    """Return the rows without their quality."""

    def scope(record: Record) -> str | None:
        return str(record.inputs["scope"]) if matters("scope", record.inputs) else None

    cells = _by_seed(sorted(records, key=lambda r: int(r.inputs.get("seed") or 0)))
    firsts = [seeds[0] for seeds in cells]
    if any(len(seeds) > 1 for seeds in cells):  # then none is labelled by the seed of one cell
        firsts = [replace(r, inputs={name: v for name, v in r.inputs.items() if name != "seed"}) for r in firsts]
    names = labels(firsts)
    groups = grouped(
        sorted(zip(firsts, cells, strict=True), key=lambda pair: str(pair[0].inputs["task"])),
        lambda pair: (names[pair[0].key], pair[0].inputs["sparsity"], scope(pair[0])),
    )
    rows = []
    for (label, *_), of_row in groups.items():
        first = of_row[0][0]
        last_bits = first.settings.get("granularity") == LAST_BITS
        kind = UPPER_BOUND if first.settings.get("upper_bound") else PRUNED
        if first.inputs["method"] == DENSE or last_bits:
            kind = ROUNDING if first.inputs.get("ffn_bits") or last_bits else CONTROL
        kind = NOISE if first.inputs["method"] == NOISE else kind
        values, asked = {}, {}
        for cell, seeds in of_row:
            for m in main_metrics(cell, metric):
                same = [o for r in seeds for o in r.metrics if (o.task, o.label) == (m.task, m.label)]
                errors = [o.stderr for o in same if o.stderr is not None]
                values[m.task] = replace(m, value=mean(o.value for o in same), stderr=mean(errors) if errors else None)
                asked[m.task] = question(cell.inputs, [*inputs.UNLIKE_DENSE, "seed"])
        rows.append(Row(
            label=label, name=label, sparsity=float(first.inputs["sparsity"]), kind=kind,
            read=mean(mean(r.weights_read for r in seeds) for _, seeds in of_row), scope=scope(first),
            values=values, asked=asked, records=[r for _, seeds in of_row for r in seeds],
            compared=[one for _, seeds in of_row for one in _mean_compared([compared.get(r.key, ()) for r in seeds])],
            overhead=mean(mean(r.flops.get("overhead_share", 0.0) for r in seeds) for _, seeds in of_row),
            speed=speeds.of_cell(measured, first.inputs),
            fetched=_mean_known([_mean_known([r.fetched for r in seeds]) for _, seeds in of_row]),
        ))  # fmt: skip
    return rows


def _mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _by_seed(records: Sequence[Record]) -> list[list[Record]]:
    """Return groups of cells that differ in nothing but the seed, of the run and of options that took it."""

    def rest(record: Record) -> str:
        own, seed = record.inputs, record.inputs.get("seed")
        params = {n: None if n.endswith(".seed") and value == seed else value for n, value in own["params"].items()}
        how = [own.get(name) for name in ("dtype", "device", *CALIBRATED)]
        return f"{identity({**own, 'seed': None, 'params': params})} {json.dumps(how)}"

    return [*grouped(records, rest).values()]


def main_metrics(record: Record, metric: str | None = None) -> list[Metric]:
    """Return the main metric of each requested task, without members of groups.

    Args:
        record: of a cell.
        metric: replaces the main metric of tasks that have it.
    """
    own = [m for m in record.metrics if m.part_of is None]
    asked = {m.task: m for m in reversed(own) if metric in (m.metric, m.label)}  # its first filter, as `main`
    return [asked.get(m.task, m) for m in metrics.main(own)]


def _mean_compared(cells: Sequence[Sequence[Compared]]) -> list[Compared]:
    """Return the metrics of seeds beside dense, averaged by document, without those that one seed has otherwise."""
    means = []
    for first in cells[0]:
        same = [one for rows in cells for one in rows if (one.a.name, one.a.units) == (first.a.name, first.a.units)]
        if len(same) == len(cells):
            sides = ([one.a for one in same], [one.b for one in same])
            means.append(Compared(*(replace(own[0], x=np.mean([side.x for side in own], axis=0)) for own in sides)))
    return means


# -- blocks ------------------------------------------------------------------------------------------------------------


def _split(rows: Sequence[Row], wanted: str) -> list[tuple[Tasks, list[Row]]]:
    """Split rows into blocks with common tasks: metric -> tasks, and the rows of each block.

    A task that was asked otherwise (other documents, examples or lengths) is another one. A block has the tasks of
    one metric that most rows have, counted in rows x tasks; a row that lacks one of them goes to a later block. For
    every further metric it has the tasks that all of its rows with that metric share.
    """
    rest: list[tuple[Row, dict[str, frozenset[tuple[str, str]]]]] = []  # metric -> its tasks, and how they were asked
    for row in rows:
        by_metric = grouped(row.values.items(), lambda item: item[1].metric)
        rest.append((row, {m: frozenset((task, row.asked[task]) for task, _ in own) for m, own in by_metric.items()}))
    blocks: list[tuple[Tasks, list[Row]]] = []
    while rest:
        first = min((m for _, own in rest for m in own), key=lambda m: (m != wanted, metrics.order(m)), default="")
        candidates = {own[first] for _, own in rest if first in own}
        covering = {c: sum(c <= own.get(first, frozenset()) for _, own in rest) for c in candidates}
        chosen = max(candidates, key=lambda c: (covering[c] * len(c), sorted(c)), default=frozenset())
        inside = [(row, own) for row, own in rest if chosen <= own.get(first, frozenset())]
        tasks = {first: tuple(sorted(task for task, _ in chosen))} if first else {}
        for metric in sorted({m for _, own in inside for m in own} - {first}, key=metrics.order):
            owned = [own[metric] for _, own in inside if metric in own]
            common = frozenset.intersection(*owned) or Counter(owned).most_common(1)[0][0]
            tasks[metric] = tuple(sorted(task for task, _ in common))
        blocks.append((tasks, [row for row, _ in inside]))
        rest = [pair for pair in rest if pair not in inside]
    return blocks


def _block(rows: Sequence[Row], scope: str, tasks: Tasks, own: Sequence[Row]) -> Block:
    """Return a block: its rows with their quality, and all other rows that ran its tasks at their reads.

    Args:
        rows: all of the board.
        scope: of the block.
        tasks: of the block.
        own: the rows that have no other block.
    """
    first = next(iter(tasks), "")
    needed = {(task, own[0].asked[task]) for task in tasks.get(first, ()) if task in own[0].asked}
    others = [
        row for row in rows
        if row not in own and needed and needed <= {*row.asked.items()} and row.scope in (None, scope)
        and (
            row.kind in (CONTROL, NOISE, ROUNDING)
            or any(abs(row.read - other.read) <= WIDTH_OF_LEVEL for other in own)
        )
    ]  # fmt: skip
    inside = [replace(row, quality=_qualities(row, tasks)) for row in [*own, *others]]
    of_first = tasks.get(first, ())
    everywhere = [task for of_metric in tasks.values() for task in of_metric]
    for field_, name, of in (
        ("nats", metrics.GOLD, of_first), ("flips", "flips", of_first), ("kl", "kl", everywhere),
        ("same", "dense_tokens", everywhere), ("length", "length", everywhere), ("limited", "limited", everywhere),
        ("loops", "loops", everywhere),
    ):  # fmt: skip
        values: Sequence[Any] = _means(inside, name, of)
        inside = [replace(row, **{field_: value}) for row, value in zip(inside, values, strict=True)]
    known = {(one.metric.task, one.metric.metric): one for row in inside for one in row.compared}
    choice = {m: [known[t, m] for t in tasks[m] if (t, m) in known] for m in tasks if metrics.kind_of(m).chance}
    at_chance = [
        one.metric.task for compared in choice.values() for one in compared
        if one.chance and len(one.sides[1].units) >= stats.MIN_CLUSTERS and not above_zero(one.sides[1])
    ]  # fmt: skip
    levels = _levels(inside, first)
    quality = {}  # of an answerer that guesses
    for metric, of_metric in choice.items():
        chances = [one.chance for one in of_metric if one.chance is not None]
        if len(chances) == len(of_metric) and any(chances):
            quality[metric] = Quality(mean(chances), None, None, NOTHING)
    if quality and levels and levels[0][0].kind == CONTROL:
        levels[0].append(Row(GUESSING, GUESSING, 0.0, 1.0, GUESSING, quality=quality))
    return Block(tasks, scope, tuple(map(tuple, levels)), tuple(sorted(at_chance)))


def _qualities(row: Row, tasks: Tasks) -> dict[str, Quality]:
    """Return the quality of a row on the tasks of its block, without metrics of which it lacks a task.

    The share is one ratio of sums over tasks: a mean of noisy ratios is biased up.
    """
    beside = {one.a.name: one for one in row.compared}
    qualities = {}
    for metric, names in tasks.items():
        own = [row.values[t] for t in names if t in row.values and row.values[t].metric == metric]
        if not own or len(own) < len(names):
            continue
        errors = [m.stderr for m in own if m.stderr is not None]
        stderr = sum(e * e for e in errors) ** 0.5 / len(own) if len(errors) == len(own) else None
        compared = [beside[m.task, m.label] for m in own if (m.task, m.label) in beside]
        better = stats.mean(one.lost.times(-1) for one in compared) if len(compared) == len(own) else None
        known = [one for one in compared if one.kind not in ("log-perplexity", "bits")]
        part = None
        if better and known and all(one.chance is not None and one.metric.higher_is_better for one in known):
            parts, wholes = (stats.mean(sides) for sides in zip(*(one.sides for one in known), strict=True))
            part = share(parts, wholes, max(one.step for one in known) / len(known)) if parts and wholes else None
        qualities[metric] = Quality(mean(m.value for m in own), stderr, better, part)
    return qualities


def _means(rows: Sequence[Row], name: str, tasks: Sequence[str]) -> list[Estimate | None]:
    """Return the mean of a metric over tasks, by row; None for rows that lack a task of another row.

    Log-likelihoods are relative to dense's. Until 0.3 the KL of rounded rows was that from dense on the same weights,
    beside no reverse: it is left out.
    """
    own: list[dict[str, Estimate]] = [{} for _ in rows]
    for by_task, row in zip(own, rows, strict=True):
        own_kl = not row.records[0].inputs.get("ffn_bits") or any(o.metric.metric == "kl_reverse" for o in row.compared)
        for one in row.compared if name != "kl" or own_kl else ():
            if one.metric.metric == name and one.metric.task in tasks:
                by_task[one.metric.task] = one.lost.times(-1) if name == metrics.GOLD else one.sides[0]
    known = {task for by_task in own for task in by_task}
    return [stats.mean(by_task.values()) if by_task.keys() == known else None for by_task in own]


def place(row: Row, first: str) -> tuple[bool, float]:
    """Return the sort key of a level's rows: the best first, those without the first metric last."""
    quality = row.quality.get(first)
    if quality is None:
        return True, 0.0
    logs = quality.better if metrics.kind_of(first).group == metrics.PERPLEXITY else None
    down = any(m.metric == first and m.higher_is_better is False for m in row.values.values())
    value = logs.value if logs else -quality.value if down else quality.value  # of perplexities the geometric mean
    return (True, 0.0) if value != value else (False, -value)


def _levels(rows: Sequence[Row], first: str) -> list[list[Row]]:
    """Return rows in levels of equal read, the highest first; inside a level by quality, upper bounds first.

    The most frequent read absorbs the rows around it, then the most frequent read of the others, and so on. A name has
    the asked read if that does not follow from the level.
    """
    rest = [row for row in rows if row.kind not in (CONTROL, NOISE)]
    levels = [level for level in [[row for row in rows if row.kind in (CONTROL, NOISE)]] if level]
    while rest:
        counts = Counter(round(row.read, 2) for row in rest)
        anchor = max(counts, key=lambda read: (counts[read], read))
        levels.append([row for row in rest if round(abs(row.read - anchor), 4) <= WIDTH_OF_LEVEL])
        rest = [row for row in rest if row not in levels[-1]]
    order, ordered = {CONTROL: 0, NOISE: 1, UPPER_BOUND: 1}, []
    for level in levels:
        several = len({row.sparsity for row in level if row.kind in (PRUNED, UPPER_BOUND)}) > 1
        named = [
            replace(row, name=f"{row.label} at {asked(row.sparsity)}")
            if row.sparsity > 0 and (several or abs(1 - row.read - row.sparsity) >= WIDTH_OF_LEVEL) else row
            for row in level
        ]  # fmt: skip
        ordered.append(sorted(named, key=lambda row: (order.get(row.kind, 2), *place(row, first), row.label)))
    return sorted(ordered, key=lambda level: (level[0].kind != CONTROL, -max(row.read for row in level)))


# -- verdicts ----------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the paired tests say of a level (docs/numbers.md).

    A row is ahead of another in a metric if it leads by more than `MATTERS`, and by so much that noise does not explain
    it; it is behind if the other one is ahead in some metric, and it in none.
    """

    leader: Row  # the first row by the first metric that is not behind another
    stands: Mapping[Row, str]  # the other pruned rows, each with where it stands beside the leader
    control: tuple[Row, str] | None  # likewise the best rounding that reads no more; None without any
    take: Row  # the leader, the cheapest row that is tied with it, or the rounding that is ahead
    fetched: tuple[Row, str] | None = None  # as `control`, of the roundings that fetch no more than the leader

    def of(self, *words: str) -> list[Row]:
        """Return the other pruned rows that stand so beside the leader."""
        return [row for row, word in self.stands.items() if word in words]

    @property
    def best(self) -> Row | None:
        """The row that is ahead of every other pruned row; None without one."""
        return self.leader if self.stands and {*self.stands.values()} == {BEHIND} else None

    def mark(self, row: Row) -> str:
        """Return `*` for the best row, `~` for the rows that are tied at the head of those behind them."""
        if row is self.best:
            return "*"
        head = self.of(BEHIND) and not self.of(AHEAD, SPLIT)
        return "~" if head and row in (self.leader, *self.of(TIED)) else ""


def verdicts(block: Block) -> list[Verdict | None]:
    """Return the verdict on each level of a block; None where nothing can be compared at equal reads."""
    rounded = [row for row in block.rows if row.kind == ROUNDING and block.first in row.quality]
    return [_verdict(level, rounded, block.first) for level in block.levels]


def _verdict(rows: Sequence[Row], rounded: Sequence[Row], first: str) -> Verdict | None:
    """Return the verdict on rows, best first. rounded: the block's rows of rounding."""
    rivals = [row for row in rows if row.kind == PRUNED and first in row.quality]
    if not rivals or all(row.read >= 1 for row in rivals) or any(row.about for row in rows):
        return None
    leader, stands = _leader(rivals)

    def beside(most: float) -> tuple[Row, str] | None:
        """Return the best rounding that reads, and so fetches, about so much at most, and where it stands."""
        fitting = sorted((row for row in rounded if row.read <= most + WIDTH_OF_LEVEL), key=lambda r: place(r, first))
        words = _stands(leader, [_leader(fitting)[0]], float(len(fitting) * len(rivals))) if fitting else {}
        return next(iter(words.items()), None)

    read = max(row.read for row in rows)
    control, fetched = beside(read), beside(max(read, leader.fetched or 0.0))
    other = fetched if fetched and (control is None or fetched[0] is not control[0]) else None
    verdict = Verdict(leader, stands, control, leader, other)
    if control is not None and control[1] == AHEAD and not verdict.of(AHEAD, SPLIT):
        return verdict._replace(take=control[0])
    costs = {row: (round(row.overhead, 4), row.bytes_of("beside") or 0) for row in (leader, *verdict.of(TIED))}
    return verdict._replace(take=min(costs, key=costs.__getitem__))


def _leader(rows: Sequence[Row]) -> tuple[Row, dict[Row, str]]:
    """Return the first row that is not behind another, else the first row, and where the others stand beside it.

    It was chosen by the tested values, so each p counts for all pairs that could have been.
    """
    candidates = []
    for row in rows:
        candidates.append((row, _stands(row, [other for other in rows if other is not row], len(rows) / 2)))
        if not {AHEAD, SPLIT} & {*candidates[-1][1].values()}:
            return candidates[-1]
    return candidates[0]


def _stands(leader: Row, others: Sequence[Row], chosen: float) -> dict[Row, str]:
    """Compare each row with the leader.

    Args:
        chosen: factor on each p, since the leader was chosen by the tested values. Holm's correction then covers all
            rows and metrics.
    """
    leads = [(row, lead) for row in others for lead in _leads(leader, row)]
    adjusted = stats.holm([None if (p := _p(lead)) is None else min(1.0, chosen * p) for _, lead in leads])
    stands = {}
    for row in others:
        own = [(lead.value, p) for (of, lead), p in zip(leads, adjusted, strict=True) if of is row]
        signs = {value > 0 for value, p in own if p is not None and p < stats.ALPHA}  # True: the leader is ahead
        tested = bool(own) and all(p is not None for _, p in own)
        stands[row] = (
            SPLIT if len(signs) == 2 else BEHIND if True in signs else AHEAD if signs else TIED if tested else UNTESTED
        )
    return stands


def _p(lead: Estimate) -> float | None:
    """Return two-sided p of a lead of at most `MATTERS`; None if it cannot be tested."""
    beyond = abs(lead.value) - MATTERS
    if beyond > 0:
        return replace(lead, value=math.copysign(beyond, lead.value)).p
    return 1.0 if lead.smallest >= stats.MIN_CLUSTERS and math.isfinite(lead.value) else None


def _leads(a: Row, b: Row) -> Iterator[Estimate]:
    """Yield A - B, positive if A is better, in the block's first metric, in perplexities and in log-likelihoods.

    Log-likelihoods of right answers separate rows with fewer documents than an accuracy.
    """
    for i, (metric, quality) in enumerate(a.quality.items()):
        if i and metrics.kind_of(metric).group != metrics.PERPLEXITY:
            continue  # the family of tests must not depend on other contents of the folder
        other = b.quality.get(metric)
        if quality.better is not None and other is not None and other.better is not None:
            yield quality.better - other.better
    if a.nats is not None and b.nats is not None:
        yield a.nats - b.nats
