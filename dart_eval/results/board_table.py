"""The board as tables: its columns, their order in a terminal that is too narrow, and the sentences under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from dart_eval.results import metrics
from dart_eval.results.board import CONTROL, DEFAULT_SCOPE, GUESSING, PRUNED, UPPER_BOUND, Block, Board, Row
from dart_eval.results.format import multiple, percent, short, size, small_share
from dart_eval.results.show import Table
from dart_eval.results.verdict import sentence, verdicts
from dart_eval.util.errors import UserError

LEVEL_SHOWN = 0.025  # reads that differ by as much from the wanted one are shown
ABSTRACTS = frozenset({"glass", "grinqh", "pop", "prox"})  # methods that are built from their papers' abstracts alone
NAMED_TASKS = 3  # that the line above a block names; of more it says how many
READ, METHOD = "FFN bytes\nread", "\nmethod"
EXPLAINED = (
    "FFN bytes read: bytes of FFN weights that a decoded token reads / those of dense; previews and copies count.",
    "above guessing: (accuracy - guessing) / (dense - guessing), one ratio of sums over the choice tasks [95 % "
    "interval, Fieller]. x dense: perplexity / dense's, geometric mean over texts.",
    "flips: share of items whose likeliest answer is not dense's. KL: KL(dense || row) of the next token, in nats.",
    "memory: bytes beside dense while one sequence decodes; state: what each further sequence adds. work: FLOPs that "
    "the method adds to a decoded token / dense's. speed: decode speed / dense's, by `dart-eval bench decode`.",
    "± is the standard error of one value: rows share documents, so paired tests compare them. * best of its level: "
    "ahead of every other pruned row beyond noise (Holm p < .05) and by more than half a point or .005 nats. ~ tied.",
)  # fmt: skip


class BoardColumn(NamedTuple):
    """A column: its name, its head, and its text for a row, also without an interval.

    `tasks` are those whose documents its numbers are means of; a cost has none.
    """

    name: str
    head: str
    text: Callable[[Row], str]
    narrow: Callable[[Row], str] | None = None
    tasks: Sequence[str] = ()


def columns_of(block: Block) -> list[BoardColumn]:
    """Return the columns of a block after the bytes and the method, the quality first."""
    columns = [column for i, metric in enumerate(block.tasks) for column in _of_metric(metric, i == 0, block)]
    rows = block.rows
    if any(row.flips for row in rows):
        columns.append(BoardColumn("flips", "flips", _flips, None, block.tasks[block.first]))
    if any(row.kl for row in rows if row.kind != CONTROL):
        columns.append(BoardColumn("kl", "KL\nnats", _kl, None, [*chain(*block.tasks.values())]))
    columns.append(BoardColumn("memory", "memory", lambda row: _bytes(row, "beside")))
    columns.append(BoardColumn("state", "state", lambda row: _bytes(row, "state")))
    columns.append(BoardColumn("work", "work", _work))
    if any(row.speed for row in rows):
        columns.append(BoardColumn("speed", "speed\ntoday", _speed))
    return columns


def _of_metric(metric: str, first: bool, block: Block) -> list[BoardColumn]:
    """Return the columns of one metric: its value, and its value relative to dense's."""
    title, kind = _title(metric, block), metrics.kind_of(metric)
    value = BoardColumn(
        title, f"{title}\n(mean)" if len(block.tasks[metric]) > 1 else title,
        lambda row: short(metric, q.value, q.stderr) if (q := row.quality.get(metric)) else "-",
        tasks=block.tasks[metric],
    )  # fmt: skip
    head = (
        f"{title}\nx dense" if kind.group == metrics.PERPLEXITY else "above\nguessing" if kind.chance else "of\ndense"
    )
    relative = BoardColumn(
        " ".join(head.split()),
        head,
        lambda row: _of_dense(row, metric, first),
        lambda row: _of_dense(row, metric, False),
        block.tasks[metric],
    )
    if kind.group == metrics.PERPLEXITY:
        return [value, relative] if first else [relative]
    shares = any(row.quality[metric].share for row in block.rows if metric in row.quality and row.keys)
    return [value, relative] if first and shares else [value]


def _title(metric: str, block: Block) -> str:
    """Return a metric's title, or its name if another metric of the block has that title, too."""
    title = metrics.title_of(metric)
    return title if [*map(metrics.title_of, block.tasks)].count(title) == 1 else metric


def _of_dense(row: Row, metric: str, ends: bool) -> str:
    """Return the share of dense's quality, of a perplexity its multiple. ends: with those of the interval."""
    times, quality = metrics.kind_of(metric).group == metrics.PERPLEXITY, row.quality.get(metric)
    ratio = None if quality is None else quality.times if times else quality.share
    if ratio is None:
        return "-"
    shown = (ratio.interval or ()) if ends and row.kind not in (CONTROL, GUESSING) else ()
    return (multiple if times else percent)(ratio.value, *shown)


def _flips(row: Row) -> str:
    return percent(row.flips.value) if row.flips else "-"


def _kl(row: Row) -> str:
    return "0" if row.kind == CONTROL else f"{row.kl.value:.3g}" if row.kl else "-"


def _bytes(row: Row, name: str) -> str:
    value = row.bytes_of(name)
    return "-" if value is None or row.kind == CONTROL else size(value)


def _work(row: Row) -> str:
    return "-" if row.kind in (CONTROL, GUESSING) else "+" * (row.overhead >= 1e-4) + small_share(row.overhead)


def _speed(row: Row) -> str:
    if row.kind == CONTROL:
        return "1.00x"
    return "-" if row.speed is None else f"{row.speed.speedup.median:.2f}x" if row.speed.speedup else "none"


def name_of(row: Row) -> str:
    """Return the name of a row, with a mark if its method is known from an abstract alone."""
    return row.name + (" †" if row.label.partition(":")[0].partition(" ")[0] in ABSTRACTS else "")


def read_of(row: Row) -> str:
    """Return the share of the FFN bytes that a row reads, `≈` if it is about right alone; empty for guessing."""
    return "" if row.kind == GUESSING else "≈" * row.about + percent(row.read)


def title_of(board: Board, block: Block) -> str:
    """Return what stands above a block: the model, or what sets it apart from the first one; its tasks."""
    parts = []
    for metric, tasks in block.tasks.items():
        counts = sorted({row.values[t].n for row in block.rows for t in tasks if t in row.values})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        kind = metrics.kind_of(metric)
        noun = "choice tasks" if kind.chance else "texts" if kind.group == metrics.PERPLEXITY else "tasks"
        parts.append(f"{', '.join(tasks) if len(tasks) <= NAMED_TASKS else f'{len(tasks)} {noun}'} x {n}")
    first = board.blocks[0]
    head = f"{board.model}, {board.about}:" if block is first else "On these tasks alone:"
    if block.scope != (DEFAULT_SCOPE if block is first else first.scope):
        head = f"{head} scope {block.scope}," if block is first else f"Scope {block.scope}:"
    return f"{head} {'; '.join(parts)}"


def shown_levels(block: Block, level: float | None) -> list[int]:
    """Return the places of the levels of a block, or of those near a read, and of dense."""
    return [
        i for i, rows in enumerate(block.levels)
        if level is None or any(r.kind == CONTROL or abs(r.read - level) <= LEVEL_SHOWN for r in rows)
    ]  # fmt: skip


def notes(board: Board) -> list[str]:
    """Return remarks on the numbers."""
    rows = [row for block in board.blocks for row in block.rows]
    said = [*board.notes]
    if any(name_of(row) != row.name for row in rows):
        said.append("† rebuilt from the abstract of its paper: no code was found.")
    if any(row.about for row in rows):
        said.append("≈: by the bits of the checkpoint's configuration, so that no test is made at equal reads.")
    if bounds := [row.label for row in rows if row.kind == UPPER_BOUND]:
        said.append(f"Upper bounds, which look ahead: {', '.join(dict.fromkeys(bounds))}.")
    if calibrated := [row.label for row in rows if row.calibrated]:
        said.append(f"Calibrated on a text in advance: {', '.join(dict.fromkeys(calibrated))}.")
    shown = {task for block in board.blocks for tasks in block.tasks.values() for task in tasks}
    if missing := sorted({task for row in board.rows for task in row.values} - shown):
        said.append(f"Tasks left out of means, since some rows lack them: {', '.join(missing)} (see --view long).")
    return said


def tables(board: Board, explain: bool = False, level: float | None = None) -> list[Table]:
    """Return the board as tables, one a block.

    Args:
        explain: whether to explain each column under the last one.
        level: read of the rows to show, beside dense.

    Raises:
        UserError: no pruned row has the read.
    """
    reads = sorted({round(row.read, 2) for block in board.blocks for row in block.rows if row.kind == PRUNED})
    if level is not None and not any(abs(read - level) <= LEVEL_SHOWN for read in reads):
        there = ", ".join(f"{read:g}" for read in reads)
        raise UserError(f"no pruned row reads about {percent(level)} of the FFN bytes", f"--level is a share: {there}")
    last = [*notes(board), *(EXPLAINED if explain else ())]
    shown = [block for block in board.blocks if shown_levels(block, level)]
    return [_table(board, block, level, last if block is shown[-1] else []) for block in shown]


def _table(board: Board, block: Block, level: float | None, last: Sequence[str]) -> Table:
    columns, judged = columns_of(block), verdicts(block)
    body: list[list[str]] = []
    rows: list[Row] = []
    rules, said = set[int](), []
    if block.at_chance:
        said.append(f"! dense is not significantly better than guessing on {', '.join(block.at_chance)}.")
    for i in shown_levels(block, level):
        rules |= {len(rows)} if rows else set()
        verdict = judged[i]
        for row in block.levels[i]:
            mark = verdict.mark(row) if verdict else ""
            rows.append(row)
            body.append([read_of(row), mark, name_of(row), *(column.text(row) for column in columns)])
        said += [sentence(verdict)] if verdict else []
    heads = [READ, "", METHOD, *(column.head for column in columns)]
    further = [metric for metric in list(block.tasks)[1:] if metrics.kind_of(metric).group != metrics.PERPLEXITY]
    # The memory, then metrics that do not order the rows, then of flips and KL the one that fewer rows have.
    far = sorted((c for c in columns if c.name in ("flips", "kl")), key=lambda c: -sum(c.text(r) == "-" for r in rows))
    names = ["state", "memory", "work", *(_title(metric, block) for metric in further), *(c.name for c in far[:-1])]
    first_out = [column.head for name in names for column in columns if column.name == name]
    narrow = {column.head: [column.narrow(row) for row in rows] for column in columns if column.narrow}
    return Table(title_of(board, block), heads, body, [*said, *last], rules=frozenset(rules), first_out=first_out,
                 narrow=narrow)  # fmt: skip
