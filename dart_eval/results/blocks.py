"""What a board is made of: rows with their quality, levels, and blocks of rows that ran on the same tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dart_eval.results import metrics, stats
from dart_eval.results.estimates import Estimate, Interval, Share, mean, share
from dart_eval.results.frame import Compared
from dart_eval.results.record import Metric
from dart_eval.results.speeds import Speed

Tasks = Mapping[str, tuple[str, ...]]  # metric -> the tasks of which a block shows it

WIDTH_OF_LEVEL = 0.02  # reads that differ by less stand in one level
PRUNED, UPPER_BOUND, CONTROL, ROUNDING, GUESSING = "pruned", "upper bound", "control", "rounding", "guessing"
USUAL = "scored"  # the scope that goes without saying


@dataclass(frozen=True)
class Quality:
    """One metric of a row, as the mean over the tasks of its block.

    Attributes:
        value: the mean, as records give it. stderr: of it.
        better: the quality less dense's, higher is better; of perplexities -log(quality / dense), mean over tasks.
        share: quality above chance, summed over tasks / that of dense; None where dense has none by more than noise.
    """

    value: float
    stderr: float | None
    better: Estimate | None = None
    share: Share | None = None

    @property
    def times(self) -> tuple[float, Interval | None] | None:
        """A perplexity as a multiple of dense's, geometric mean over tasks, with its interval."""
        if self.better is None:
            return None
        ends = self.better.interval
        return stats.exp(-self.better.value), ends and (stats.exp(-ends[1]), stats.exp(-ends[0]))


@dataclass(frozen=True)
class Row:
    """A method at a sparsity.

    Attributes:
        label: the method, and what else tells the row apart. name: the same with the sparsity, where the level does not
            say it.
        sparsity: as it was asked. read: bytes of FFN weights that a decoded token reads / those of dense.
        kind: `pruned`, `upper bound`, `control` (dense), `rounding` (dense on rounded weights, or on their first bits)
            or `guessing`.
        scope: which positions ran pruned; None of dense, rounded or not, which is the same in all of them.
        values: task -> its main metric.
        quality: metric -> the mean over the block's tasks.
        nats: log-likelihood of the right answers less that under dense, mean over tasks.
        flips: share of items whose chosen answer is not dense's. kl: divergence of dense's next-token distribution to
            the row's, in nats. Both are means over tasks.
        memory: bytes kept beside the model, the most over the cells.
        overhead: FLOPs that the method adds to a decoded token / FLOPs of a dense one, mean over the cells.
        calibrated: it has read a text before any prompt.
        speed: of decoding, where `bench` wrote one into the folder, or that no kernel makes its bytes into time.
        mark: `best` of its level, `not told apart` from it, or empty.
        keys: of the records.
    """

    label: str
    name: str
    sparsity: float
    read: float
    kind: str
    scope: str | None = None
    values: Mapping[str, Metric] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)
    nats: Estimate | None = None
    flips: Estimate | None = None
    kl: Estimate | None = None
    memory: int = 0
    overhead: float = 0.0
    calibrated: bool = False
    speed: Speed | None = None
    mark: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """Rows of one read, best first.

    Attributes:
        said: of quality, and of cost; nothing where there is nothing to compare.
        rounding_wins: rounding keeps more than any pruned row, and that is more than noise.
    """

    rows: tuple[Row, ...]
    said: tuple[str, ...] = ()
    rounding_wins: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that ran on the same tasks, under one scope.

    Attributes:
        tasks: metric -> the tasks that its means are over, the metric first that rows are ordered by.
        scope: which positions ran pruned. levels: the highest read first.
        at_chance: choice tasks on which dense is not above guessing by more than noise.
    """

    tasks: Tasks
    scope: str
    levels: tuple[Level, ...]
    at_chance: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows of all levels, from the top to the end."""
        return [row for level in self.levels for row in level.rows]


@dataclass(frozen=True)
class Board:
    """The board of one model.

    Attributes:
        about: the model and what it ran on. columns: task -> its main metric.
        notes: what a reader must know beside the numbers.
    """

    model: str
    about: str
    columns: dict[str, str]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows of all blocks."""
        return [row for block in self.blocks for row in block.rows]


def split(rows: Sequence[Row], wanted: str | None = None) -> list[tuple[Tasks, list[Row]]]:
    """Rows in blocks that have tasks in common: metric -> tasks, and the rows of each block.

    A block is of the tasks of one metric that most rows have, counted in rows x tasks; a row that lacks one of them
    goes to a later block. Of every further metric the block has the tasks that all its rows share which have any.
    """
    left = list(rows)
    blocks: list[tuple[Tasks, list[Row]]] = []
    while left:
        sets = [_tasks_of(row) for row in left]
        first = min((m for own in sets for m in own), key=lambda m: (m != wanted, metrics.order(m)), default="")
        candidates = {own[first] for own in sets if first in own}
        chosen = max(candidates, key=lambda c: (_covered(c, first, sets) * len(c), sorted(c)), default=frozenset())
        inside = [i for i, own in enumerate(sets) if chosen <= own.get(first, frozenset())]
        tasks = {first: tuple(sorted(chosen))} if first else {}
        for metric in sorted({m for i in inside for m in sets[i]} - {first}, key=metrics.order):
            owned = [sets[i][metric] for i in inside if metric in sets[i]]
            common = frozenset.intersection(*owned) or Counter(owned).most_common(1)[0][0]
            tasks[metric] = tuple(sorted(common))
        blocks.append((tasks, [left[i] for i in inside]))
        left = [row for i, row in enumerate(left) if i not in inside]
    return blocks


def _tasks_of(row: Row) -> dict[str, frozenset[str]]:
    """Metric, without its filter -> the tasks of which the row has it as their main one."""
    found: dict[str, set[str]] = {}
    for task, m in row.values.items():
        found.setdefault(m.metric.partition(",")[0], set()).add(task)
    return {metric: frozenset(tasks) for metric, tasks in found.items()}


def _covered(tasks: frozenset[str], metric: str, sets: Sequence[Mapping[str, frozenset[str]]]) -> int:
    return sum(tasks <= own.get(metric, frozenset()) for own in sets)


def qualities(values: Mapping[str, Metric], found: Sequence[Compared], tasks: Tasks) -> dict[str, Quality]:
    """The quality of a row on the tasks of its block; a metric of which it lacks a task is left out.

    Args:
        values: task -> main metric. found: the row's metrics beside dense's. tasks: of the block.
    """
    beside = {(one.measure.task, one.measure.metric): one for one in found}
    made = {}
    for metric, names in tasks.items():
        own = [values[t] for t in names if t in values and values[t].metric.partition(",")[0] == metric]
        if not own or len(own) < len(names):
            continue
        errors = [m.stderr for m in own if m.stderr is not None]
        stderr = sum(e * e for e in errors) ** 0.5 / len(own) if len(errors) == len(own) else None
        value = sum(m.value for m in own) / len(own)
        pairs = [beside[m.task, m.metric] for m in own if (m.task, m.metric) in beside]
        better = mean(one.lost.times(-1) for one in pairs) if len(pairs) == len(own) else None
        made[metric] = Quality(value, stderr, better, None if better is None else over(pairs))
    return made


def over(rows: Iterable[Compared]) -> Share | None:
    """Quality above chance over dense's, as one ratio of sums over tasks (a mean of noisy ratios is biased upwards)."""
    known = [one for one in rows if one.measure.kind not in ("log-perplexity", "bits")]
    if not known or any(one.chance is None or not one.measure.higher_is_better for one in known):
        return None
    parts, wholes = (mean(sides) for sides in zip(*(one.sides for one in known), strict=True))
    step = max(one.step for one in known) / len(known)
    return None if parts is None or wholes is None else share(parts, wholes, step)
