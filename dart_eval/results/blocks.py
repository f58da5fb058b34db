"""The parts of a board: rows with their quality, levels, and blocks of rows that ran on the same tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dart_eval.results import metrics
from dart_eval.results.estimates import Estimate, Share, mean, share
from dart_eval.results.frame import Compared
from dart_eval.results.record import Metric
from dart_eval.results.speeds import Speed

Tasks = Mapping[str, tuple[str, ...]]  # metric -> its tasks in a block

WIDTH_OF_LEVEL = 0.02  # reads that differ by less are one level
PRUNED, UPPER_BOUND, CONTROL, ROUNDING, GUESSING = "pruned", "upper bound", "control", "rounding", "guessing"
DEFAULT_SCOPE = "scored"  # not named on the board


@dataclass(frozen=True)
class Quality:
    """One metric of a row, as the mean over the tasks of its block.

    Attributes:
        value: mean of the records' values.
        stderr: of the mean.
        better: quality minus dense's, higher is better; for perplexities -log(quality / dense), mean over tasks.
        share: quality above chance, summed over tasks / that of dense; None if dense's is not above noise.
    """

    value: float
    stderr: float | None
    better: Estimate | None = None
    share: Share | None = None

    @property
    def times(self) -> Share | None:
        """A perplexity as a multiple of dense's, geometric mean over tasks, with its interval."""
        return None if self.better is None else self.better.exp_minus()


@dataclass(frozen=True)
class BoardRow:
    """A method at a sparsity.

    Attributes:
        label: the method, with the settings that distinguish the row.
        name: the label, with the sparsity if the level does not show it.
        sparsity: requested sparsity.
        read: bytes of FFN weights that a decoded token reads / those of dense.
        about: whether the read is about right alone, so that no test is made at equal reads.
        kind: `pruned`, `upper bound`, `control` (dense), `rounding` (dense on rounded weights, or on their first bits)
            or `guessing`.
        scope: which positions ran pruned; None for dense, rounded or not, which is the same in all scopes.
        values: task -> its main metric.
        asked: task -> what was asked: equal text, equal documents and prompts.
        quality: metric -> the mean over the block's tasks.
        nats: log-likelihood of the right answers minus that under dense, mean over tasks.
        flips: share of items whose chosen answer is not dense's, mean over tasks.
        kl: divergence of dense's next-token distribution to the row's, in nats, mean over tasks.
        memory: bytes beside the model while one sequence decodes, the most over the cells; None in old records.
        overhead: FLOPs that the method adds to a decoded token / FLOPs of a dense one, mean over the cells.
        calibrated: whether it has read a text before any prompt.
        speed: decoding speed from `bench`, if the folder has one, or the lack of a kernel.
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
    asked: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)
    nats: Estimate | None = None
    flips: Estimate | None = None
    kl: Estimate | None = None
    memory: int | None = None
    overhead: float = 0.0
    calibrated: bool = False
    speed: Speed | None = None
    mark: str = ""
    keys: tuple[str, ...] = ()
    about: bool = False

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Its tasks, and how each was asked."""
        return [(task, self.asked.get(task, "")) for task in self.values]


@dataclass(frozen=True)
class Level:
    """Rows of one read, best first.

    Attributes:
        sentences: on quality, and on cost; none if there is nothing to compare.
        rounding_wins: whether rounding beats the best pruned row by more than noise.
        take: the first pruned row that no test puts behind another, or the rounding that wins; None without either.
        alone: whether there is one pruned row, and the rounding beside it is worse.
    """

    rows: tuple[BoardRow, ...]
    sentences: tuple[str, ...] = ()
    rounding_wins: bool = False
    take: BoardRow | None = None
    alone: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that ran on the same tasks, under one scope.

    Attributes:
        tasks: metric -> the tasks of its means; the first metric orders the rows.
        scope: which positions ran pruned.
        levels: the highest read first.
        at_chance: choice tasks on which dense is not above guessing by more than noise.
    """

    tasks: Tasks
    scope: str
    levels: tuple[Level, ...]
    at_chance: tuple[str, ...] = ()

    @property
    def rows(self) -> list[BoardRow]:
        """The rows of all levels, from the top to the end."""
        return [row for level in self.levels for row in level.rows]


@dataclass(frozen=True)
class Board:
    """The board of one model.

    Attributes:
        about: dtype and hardware.
        columns: task -> its main metric.
        notes: remarks on the numbers.
    """

    model: str
    about: str
    columns: dict[str, str]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[BoardRow]:
        """The rows of all blocks."""
        return [row for block in self.blocks for row in block.rows]


def split(rows: Sequence[BoardRow], wanted: str | None = None) -> list[tuple[Tasks, list[BoardRow]]]:
    """Split rows into blocks with common tasks: metric -> tasks, and the rows of each block.

    A task that was asked otherwise (other documents, examples or lengths) is another one. A block has the tasks of
    one metric that most rows have, counted in rows x tasks; a row that lacks one of them goes to a later block. For
    every further metric it has the tasks that all of its rows with that metric share.
    """
    rest = list(rows)
    blocks: list[tuple[Tasks, list[BoardRow]]] = []
    while rest:
        sets = [_tasks_of(row) for row in rest]
        first = min((m for own in sets for m in own), key=lambda m: (m != wanted, metrics.order(m)), default="")
        candidates = {own[first] for own in sets if first in own}
        covering = {c: sum(c <= own.get(first, frozenset()) for own in sets) for c in candidates}
        chosen = max(candidates, key=lambda c: (covering[c] * len(c), sorted(c)), default=frozenset())
        inside = [i for i, own in enumerate(sets) if chosen <= own.get(first, frozenset())]
        tasks = {first: tuple(sorted(task for task, _ in chosen))} if first else {}
        for metric in sorted({m for i in inside for m in sets[i]} - {first}, key=metrics.order):
            owned = [sets[i][metric] for i in inside if metric in sets[i]]
            common = frozenset.intersection(*owned) or Counter(owned).most_common(1)[0][0]
            tasks[metric] = tuple(sorted(task for task, _ in common))
        blocks.append((tasks, [rest[i] for i in inside]))
        rest = [row for i, row in enumerate(rest) if i not in inside]
    return blocks


def _tasks_of(row: BoardRow) -> dict[str, frozenset[tuple[str, str]]]:
    """Return metric, without its filter -> the tasks whose main metric it is in the row, and how they were asked."""
    found: dict[str, set[tuple[str, str]]] = {}
    for (task, asked), m in zip(row.questions, row.values.values(), strict=True):
        found.setdefault(m.metric.partition(",")[0], set()).add((task, asked))
    return {metric: frozenset(tasks) for metric, tasks in found.items()}


def qualities(values: Mapping[str, Metric], compared: Sequence[Compared], tasks: Tasks) -> dict[str, Quality]:
    """Return the quality of a row on the tasks of its block, without metrics of which it lacks a task.

    Args:
        values: task -> main metric.
        compared: the row's metrics beside dense's.
        tasks: of the block.
    """
    beside = {(one.measure.task, one.measure.metric): one for one in compared}
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
    """Return quality above chance / dense's, as one ratio of sums over tasks (a mean of noisy ratios is biased up)."""
    known = [one for one in rows if one.measure.kind not in ("log-perplexity", "bits")]
    if not known or any(one.chance is None or not one.measure.higher_is_better for one in known):
        return None
    parts, wholes = (mean(sides) for sides in zip(*(one.sides for one in known), strict=True))
    step = max(one.step for one in known) / len(known)
    return None if parts is None or wholes is None else share(parts, wholes, step)
