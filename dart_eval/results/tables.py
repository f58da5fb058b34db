"""The tables of a folder of results: the board with its sentences, every metric of every cell, and what cells cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import pandas as pd

from dart_eval.results import metrics, show
from dart_eval.results.board import (
    AHEAD,
    CONTROL,
    DEFAULT_SCOPE,
    GUESSING,
    NOISE,
    PRUNED,
    ROUNDING,
    SPLIT,
    TIED,
    UNTESTED,
    Block,
    Board,
    Row,
    Verdict,
    verdicts,
)
from dart_eval.results.frame import cells_frame, in_order
from dart_eval.results.record import Record
from dart_eval.results.show import Columns, Table
from dart_eval.util.errors import UserError

APART = 0.005  # half a point: of reads and what is fetched for them
LEVEL_SHOWN = 0.025  # reads that differ by as much from the wanted one are shown
LENGTHS: dict[str, tuple[str, Callable[[float], str]]] = {  # of texts, by the field of a row
    "length": ("tokens\nx dense", metrics.multiple), "limited": ("at the\nlimit", metrics.percent),
    "loops": ("loops", metrics.percent), "same": ("tokens\nlike dense", partial(metrics.number, digits=1)),
}  # fmt: skip
MOST_NAMED = 3  # tasks in a title, or rows in a sentence; of more their number is given


class Column(NamedTuple):
    """A column of the board."""

    head: str
    text: Callable[[Row], str]
    tasks: Sequence[str] = ()  # of whose documents its numbers are means; none of a cost


def quality_of(block: Block) -> list[Column]:
    """Return the first metric's column, that of its share of dense's if there is one, and perplexities over dense's."""
    columns = []
    for metric, tasks in block.tasks.items():
        first, kind = metric == block.first, metrics.kind_of(metric)
        head = "above\nguessing" if kind.chance else "of\ndense"
        if kind.group == metrics.PERPLEXITY:
            head, shares = f"{_title(metric, block)}\nx dense", True
        else:
            shares = first and any(q.share for row in block.rows if (q := row.quality.get(metric)) and row.keys)
        columns += [_value(metric, block)] if first else []
        columns += [Column(head, partial(_beside_dense, metric=metric, ends=first), tasks)] if shares else []
    return columns


def columns_of(block: Block) -> tuple[list[Column], int]:
    """Return the columns after the method, the most important first, and the number of those that may be missed."""
    columns, rows, first = quality_of(block), block.rows, block.tasks.get(block.first, ())
    if any(row.speed for row in rows):
        columns.append(Column("speed\ntoday", _speed))
    flips = Column("flips", lambda row: metrics.percent(row.flips.value) if row.flips else "-", first)
    floor = next((row.kl.value for row in rows if row.kind == NOISE and row.read >= 1 and row.kl), 0.0)
    kl = Column("KL nats" + "\nx noise" * (floor > 0), partial(_kl, floor=floor), [*chain(*block.tasks.values())])
    known = [(sum(row.flips is not None for row in rows), flips),
             (sum(row.kl is not None and row.kind != CONTROL for row in rows), kl)]  # fmt: skip
    distances = [column for n, column in sorted(known, key=lambda pair: -pair[0]) if n]
    others = [metric for metric in [*block.tasks][1:] if metrics.kind_of(metric).group != metrics.PERPLEXITY]
    fetched = [Column("fetched", _fetched)] * any((row.fetched or 0.0) - row.read >= APART for row in rows)
    spare = [
        *distances[1:], *fetched, Column("work", _work), Column("memory", partial(_bytes, name="beside")),
        Column("state", partial(_bytes, name="state")), *(_value(metric, block) for metric in others),
        *lengths_of(block),
    ]  # fmt: skip
    return [*columns, *distances[:1], *spare], len(spare)


def lengths_of(block: Block) -> list[Column]:
    """Return the columns on how long texts are, where the rows have them."""

    def text(row: Row, name: str, shown: Callable[[float], str]) -> str:
        return "-" if (value := getattr(row, name)) is None else shown(value.value)

    tasks = [*chain(*block.tasks.values())]
    return [
        Column(head, partial(text, name=name, shown=shown), tasks)
        for name, (head, shown) in LENGTHS.items() if any(getattr(row, name) for row in block.rows)
    ]  # fmt: skip


def _value(metric: str, block: Block) -> Column:
    tasks = block.tasks[metric]

    def text(row: Row) -> str:
        return metrics.short(metric, q.value, q.stderr) if (q := row.quality.get(metric)) else "-"

    return Column(_title(metric, block) + "\n(mean)" * (len(tasks) > 1), text, tasks)


def _title(metric: str, block: Block) -> str:
    """Return a metric's title, or its name if another metric of the block has that title, too."""
    title = metrics.title_of(metric)
    return title if [*map(metrics.title_of, block.tasks)].count(title) == 1 else metric


def _beside_dense(row: Row, metric: str, ends: bool) -> str:
    """Return the share of dense's quality, of a perplexity its multiple. ends: with those of the interval."""
    if (quality := row.quality.get(metric)) is None or (ratio := quality.beside_dense(metric)) is None:
        return "-"
    shown = (ratio.interval or ()) if ends and row.kind not in (CONTROL, GUESSING) else ()
    of_perplexity = metrics.kind_of(metric).group == metrics.PERPLEXITY
    return (metrics.multiple if of_perplexity else metrics.percent)(ratio.value, *shown)


def _kl(row: Row, floor: float) -> str:
    """Return the divergence from dense in nats, and as a multiple of the noise's."""
    if row.kind == CONTROL or not row.kl:
        return "0" if row.kind == CONTROL else "-"
    return f"{row.kl.value:.3g}" + (f" {metrics.multiple(row.kl.value / floor)}" if floor else "")


def _bytes(row: Row, name: str) -> str:
    value = row.bytes_of(name)
    return "-" if value is None or row.kind == CONTROL else metrics.size(value)


def _fetched(row: Row) -> str:
    return "-" if row.fetched is None else metrics.percent(row.fetched)


def _work(row: Row) -> str:
    return "-" if row.kind in (CONTROL, GUESSING) else "+" * (row.overhead >= 1e-4) + metrics.small_share(row.overhead)


def _speed(row: Row) -> str:
    if row.kind == CONTROL:
        return "1.00x"
    return "-" if row.speed is None else f"{row.speed.speedup.median:.2f}x" if row.speed.speedup else "none"


def read_of(row: Row) -> str:
    """Return the share of the FFN bytes that a row reads, `≈` if it is about right alone; empty for guessing."""
    return "" if row.kind == GUESSING else "≈" * row.about + metrics.percent(row.read)


def title_of(board: Board, block: Block) -> str:
    """Return what stands above a block: the model, or what sets it apart from the first one; its tasks."""
    parts = []
    for metric, tasks in block.tasks.items():
        counts = sorted({row.values[t].n for row in block.rows for t in tasks if t in row.values})
        kind = metrics.kind_of(metric)
        noun = "choice tasks" if kind.chance else "texts" if kind.group == metrics.PERPLEXITY else "tasks"
        names = ", ".join(tasks) if len(tasks) <= MOST_NAMED else f"{len(tasks)} {noun}"
        parts.append(f"{names} x {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))}")
    first = board.blocks[0]
    head = f"{board.model}, {board.about}:" if block is first else "On these tasks alone:"
    if block.scope != (DEFAULT_SCOPE if block is first else first.scope):
        head = f"{head} scope {block.scope}," if block is first else f"Scope {block.scope}:"
    return f"{head} {'; '.join(parts)}"


def sentence(block: Block, verdict: Verdict) -> str:
    """Return a verdict in words.

    `At 16 % grinqh (perplexity 1.38x [1.35, 1.42]) is the best of the pruned rows. Rounding (dense on 2 bits:
    perplexity 378x [318, 448]) is behind.`
    """
    quality = quality_of(block)

    def amounts(row: Row) -> str:
        shown = [(column.head.removesuffix("x dense").split(), column.text(row)) for column in quality[1:] or quality]
        return ", ".join(" ".join([*head, text]) for head, text in shown)

    def names(rows: Sequence[Row]) -> str:
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        return ", ".join(row.name for row in rows[:MOST_NAMED]) + more

    leader, ahead, untested = verdict.leader, verdict.of(AHEAD, SPLIT), verdict.of(UNTESTED)
    tied = [leader, *verdict.of(TIED)]
    row = verdict.take if verdict.take in tied and not ahead else leader
    others = [other for other in tied if other is not row]
    said = ["is the best of the pruned rows"] if verdict.best else [] if verdict.stands else ["is the only pruned row"]
    if ahead:
        said = [f"is behind {names(ahead)} in a metric, so that no row is best"]
    elif others:
        cheaper = " and costs less" if row.overhead < min(other.overhead for other in others) else ""
        said = [f"is tied with {names(others)}{cheaper}"]
    said += [f"is not tested against {names(untested)}"] if untested else []
    text = f"At {metrics.percent(leader.read)} {row.name} ({amounts(row)}) {', and '.join(said)}."
    words = {SPLIT: "ahead in one metric and behind in another", UNTESTED: "not tested"}
    at_fetched = f"{leader.name} fetches {_fetched(leader)}, and rounding to as much"
    for head, control in (("Rounding", verdict.control), (at_fetched, verdict.fetched)):
        if control is not None:
            rounded, word = control
            text = f"{text} {head} ({rounded.name}: {amounts(rounded)}) is {words.get(word, word)}."
    return text


def notes(board: Board) -> list[str]:
    """Return remarks on the numbers."""
    rows = [row for block in board.blocks for row in block.rows]
    records = [record for row in rows for record in row.records]
    texts: dict[str, dict[str, None]] = {}  # of a text, the rows that are calibrated on it
    for row in rows:
        for record in row.records:
            if record.inputs.get("calibration"):
                texts.setdefault(str(record.settings.get("calibration", "a text")), {})[row.label] = None
    plain = [row for row in rows if row.kind == ROUNDING and not any(row.label in names for names in texts.values())]
    shown = {task for block in board.blocks for tasks in block.tasks.values() for task in tasks}
    missing = sorted({task for row in board.rows for task in row.values} - shown)
    return [
        *board.notes, *about(records), *upper_bounds(records),
        *(f"Calibrated on {text} in advance: {', '.join(names)}." for text, names in texts.items()),
        *([f"Rounded without calibration: {', '.join(dict.fromkeys(row.label for row in plain))}."] if plain else []),
        *([f"Left out of means, since some rows lack them: {', '.join(missing)} (--view long)."] if missing else []),
    ]  # fmt: skip


def board_tables(boards: Sequence[Board], level: float | None = None) -> list[Table]:
    """Return boards as tables, one a block.

    Args:
        level: read of the rows to show, beside dense.

    Raises:
        UserError: no pruned row has the read.
    """

    def near(row: Row) -> bool:
        return level is None or abs(row.read - level) <= LEVEL_SHOWN

    pruned = [row for board in boards for block in board.blocks for row in block.rows if row.kind == PRUNED]
    if level is not None and not any(map(near, pruned)):
        there = ", ".join(f"{read:g}" for read in sorted({round(row.read, 2) for row in pruned}))
        problem = f"no pruned row reads about {metrics.percent(level)} of the FFN bytes"
        raise UserError(problem, f"--level is a share: {there}")
    tables = []
    for board in boards:
        for block in board.blocks:
            judged = zip(block.levels, verdicts(block), strict=True)
            levels = [pair for pair in judged if any(near(row) or row.kind == CONTROL for row in pair[0])]
            tables += [_table(title_of(board, block), block, levels)] if levels else []
        tables[-1] = replace(tables[-1], notes=[*tables[-1].notes, *notes(board)])
    return tables


def _table(title: str, block: Block, levels: Sequence[tuple[Sequence[Row], Verdict | None]]) -> Table:
    columns, spare = columns_of(block)
    weak = f"! dense is not significantly better than guessing on {', '.join(block.at_chance)}."
    said, body = [weak] if block.at_chance else [], list[list[str]]()
    for rows, verdict in levels:
        for row in rows:
            mark = verdict.mark(row) if verdict else ""
            body.append([read_of(row), mark, row.name, *(column.text(row) for column in columns)])
        said += [sentence(block, verdict)] if verdict else []
    heads = ["FFN bytes\nread", "", "method", *(column.head for column in columns)]
    return Table(title, heads, body, said, spare=spare)


# -- every cell --------------------------------------------------------------------------------------------------------


QUALITY: Columns = {
    "n": ("n", str), "effective": ("effective_sparsity", metrics.three), "masked out": ("mask_sparsity", metrics.three),
    "read": ("weights_read", metrics.three), "fetched": ("fetched", metrics.three), "scope": ("scope", str),
}  # fmt: skip
NO_NUMBER_NOTE = f"{metrics.NO_NUMBER}: answers were NaN or infinite; run the cell again in another dtype."
QUALITY_NOTE = (
    "Value ± standard error. effective: sparsity over all tokens, dense ones included. masked out: share of neurons "
    "outside the mask. read: share of FFN weight bytes that a pruned token reads."
)
FETCHED_NOTE = "fetched: what is read, in whole lines of 64 bytes."
COUNT, ONE = partial(metrics.size, unit=""), partial(metrics.number, digits=1)
COSTS: Columns = {
    "read": ("weights_read", metrics.three), "context": ("flops_context_tokens", partial(metrics.number, digits=0)),
    "prefill": ("prefill", COUNT), "decode": ("decode", COUNT), "/ dense": ("ratio", metrics.three),
    "re-masks": ("remasks", str), "weights": ("memory_weights", metrics.size),
    "memory": ("memory_beside", metrics.size), "state": ("memory_state", metrics.size),
    "peak": ("memory_peak", metrics.size), "seconds": ("seconds", ONE), "tokens/s": ("speed", ONE),
}  # fmt: skip
COSTS_NOTE = (
    "FLOPs are counted from shapes, at the cell's mean context and with all that the method adds, as if the pruned "
    "neurons were skipped: they are not time saved. decode: of a token. memory: beside the model's weights while one "
    "sequence decodes; state: of each further one. peak: of the process or GPU. seconds: of the whole cell."
)


def quality(lines: pd.DataFrame, records: Sequence[Record]) -> list[Table]:
    """Return the tables of every metric of every cell: accuracy, summaries, perplexity, distances and others.

    Args:
        lines: a row per cell and metric (`frame.lines`).
        records: of the same cells.
    """
    tables, line = [], ["task", "key"]
    for group in metrics.GROUPS:
        data = lines[[metrics.kind_of(metric).group == group for metric in lines.get("metric", ())]]
        if data.empty:
            continue
        shown = zip(data["metric"], data["value"], data["stderr"], strict=True)
        data = data.assign(text=[metrics.with_error(*one) for one in shown])
        texts = data.pivot_table("text", line, "metric", aggfunc="last").add_prefix("text ")
        rows = in_order(data.drop_duplicates(line).join(texts, on=line))
        names = sorted(data["metric"].unique(), key=metrics.order)
        taken = {*_place(rows), *QUALITY}
        values: Columns = {f"{name} (metric)" if name in taken else name: (f"text {name}", str) for name in names}
        model = [f"Model {rows['model'].iloc[0]}."] if rows["model"].nunique() == 1 else []
        own = [r for r in records if r.key in set(rows["key"])]
        broken = [NO_NUMBER_NOTE] if (data["text"] == metrics.NO_NUMBER).any() else []
        notes = [*model, *broken, QUALITY_NOTE, *upper_bounds(own), *about(own), *cut_prompts(own)]
        apart = any(rows["fetched"].astype(float) - rows["weights_read"] >= APART)
        columns = {head: column for head, column in QUALITY.items() if head != "fetched" or apart}
        notes += [FETCHED_NOTE] * apart
        tables.append(show.table(group, rows, {**_place(rows), **values, **columns}, notes, columns))
    return tables


def costs(records: Sequence[Record]) -> Table:
    """Return what every cell cost: FLOPs with the method's own work, bytes read, memory and time."""
    data = cells_frame(records)
    data["speed"] = data["tokens"] / data["seconds"]
    if "flops_overhead_prefill" in data:  # of the cells of other programs nothing may be counted
        data["prefill"] = data["flops_prefill"] + data["flops_overhead_prefill"]
        data["decode"] = data["flops_decode_step_pruned"] + data["flops_overhead_decode_step"]
        data["ratio"] = data["decode"] / data["flops_decode_step_dense"]
    return show.table("Costs", data, {**_place(data), **COSTS}, [COSTS_NOTE, *about(records)], COSTS)


def _place(data: pd.DataFrame) -> Columns:
    """Return the columns that identify a cell; the model only if there are several."""
    columns: Columns = {"task": ("task", str), "method": ("label", str), "asked read": ("sparsity", metrics.asked)}
    return columns if data["model"].nunique() == 1 else {"model": ("model", str), **columns}


def upper_bounds(records: Sequence[Record]) -> list[str]:
    """Return a sentence that names upper bounds, if there are any."""
    bounds = [r for r in records if r.settings.get("upper_bound")]
    names = dict.fromkeys(str(r.settings.get("method", r.inputs["method"])) for r in bounds)
    return [f"Upper bounds, which look ahead: {', '.join(names)}."] if names else []


def about(records: Sequence[Record]) -> list[str]:
    """Return a sentence if some reads are about right alone."""
    names = dict.fromkeys(str(r.inputs["model"]["name"]) for r in records if r.settings.get("about"))
    return [f"Reads of {', '.join(names)} are about (≈): by the bits of its configuration."] if names else []


def cut_prompts(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each task with prompts that were cut to the context."""
    sentences: dict[str, None] = {}
    for r in records:
        parts = [p for p in r.by_task.values() if "cut" in p]
        cut, asked = (sum(int(p.get(name, 0)) for p in parts) for name in ("cut", "documents"))
        if cut:
            length = int(max(p.get("length", 0) for p in parts))
            said = f"{cut} of {asked} prompts of {r.inputs['task']} {'was' if cut == 1 else 'were'} cut"
            sentences[f"{said} to fit with the answer into {length} tokens."] = None
    return list(sentences)
