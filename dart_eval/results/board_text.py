"""The board for people: as lines for a terminal of any width, and as a table for Markdown and LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dart_eval.results import metrics
from dart_eval.results.blocks import (
    CONTROL,
    DEFAULT_SCOPE,
    GUESSING,
    PRUNED,
    UPPER_BOUND,
    Block,
    Board,
    BoardRow,
    Level,
    Quality,
)
from dart_eval.results.format import multiple, percent, short, size, small_share, sparsity
from dart_eval.results.verdict import BEST, LEVEL_WITH_BEST
from dart_eval.results.writers import Table
from dart_eval.util.text import folded, printable

LEVEL_SHOWN = 0.025  # reads that differ by as much from the wanted one are shown
MARKS = {BEST: "*", LEVEL_WITH_BEST: "~"}
ABSTRACTS = frozenset({"glass", "grinqh", "pop", "prox"})  # methods that are built from their papers' abstracts alone
NARROWEST, WIDEST = 16, 30  # characters of a method's name, before it goes over several lines
NAMED_TASKS = 3  # that the line above a block names; of more it says how many
EXPLAINED = (
    "FFN bytes read: bytes of FFN weights that a decoded token reads / those of dense; previews and copies count.",
    "above guessing: (accuracy - guessing) / (dense - guessing), one ratio of sums over the choice tasks [95 % "
    "interval, Fieller]. 100 % is dense, 0 % is guessing, below 0 % is worse than guessing.",
    "of dense: quality / dense's quality, of a metric without a chance level.",
    "x dense: perplexity / dense's on the same documents, geometric mean over texts.",
    "flips: share of items whose likeliest answer is not dense's, right or wrong.",
    "KL: KL(dense || row) of the next token, mean over scored positions, in nats; rows on rounded weights have none.",
    "memory: bytes that lie beside the dense model while one sequence decodes, copies and codes of weights included. "
    "work: FLOPs that the method adds to a decoded token / FLOPs of dense.",
    "speed today: decode speed / dense's, measured by `dart-eval bench decode`; none: no kernel turns the saved "
    "bytes into time.",
    "Value ± its own standard error: rows share documents, so the paired tests compare them. * best pruned row of its "
    "level. ~ no significant difference from it: paired tests of the first metric, perplexity and the log-likelihood "
    "of right answers, Holm-adjusted over rows and metrics, p < .05.",
    "Rounding rounds the weights for all tokens, the prompt included; pruning leaves the prompt dense, "
    "but methods with codes run it on these. The method `rounding` rounds the weights for decoded tokens only.",
)  # fmt: skip


@dataclass(frozen=True)
class BoardColumn:
    """A column: its name for `--sort`, its head in two lines, and its text and sort key for a row."""

    name: str
    head: tuple[str, str]
    text: Callable[[BoardRow], str]
    key: Callable[[BoardRow], float | None]
    narrow: Callable[[BoardRow], str] | None = None  # the same without its interval

    @property
    def title(self) -> str:
        """The head in one line."""
        return " ".join(part for part in self.head if part)


def columns_of(block: Block) -> list[BoardColumn]:
    """Return the columns of a block after the bytes and the method, the quality first."""
    found: list[BoardColumn] = []
    for i, metric in enumerate(block.tasks):
        found += _of_metric(metric, i == 0, block)
    rows = block.rows
    if any(row.flips for row in rows):
        found.append(BoardColumn("flips", ("flips", ""), lambda r: percent(r.flips.value) if r.flips else "-",
                            lambda r: r.flips.value if r.flips else None))  # fmt: skip
    if any(row.kl for row in rows if row.kind != CONTROL):
        found.append(BoardColumn("kl", ("KL", "nats"),
                            lambda r: "0" if r.kind == CONTROL else f"{r.kl.value:.3g}" if r.kl else "-",
                            lambda r: r.kl.value if r.kl else None))  # fmt: skip
    found += [
        BoardColumn("memory", ("memory", "beside"), 
                    lambda r: "-" if r.memory is None else _beside(r, size(r.memory)), lambda r: r.memory),
        BoardColumn("work", ("work", ""),
                    lambda r: _beside(r, "+" * (r.overhead >= 1e-4) + small_share(r.overhead)), lambda r: r.overhead),
    ]  # fmt: skip
    if any(row.speed for row in rows):
        found.append(BoardColumn("speed", ("speed", "today"), _speed, lambda r: -_ratio(r)))
    return found


def _of_metric(metric: str, first: bool, block: Block) -> list[BoardColumn]:
    """Return the columns of one metric: its value, and its value relative to dense's."""
    many, title = len(block.tasks[metric]) > 1, _title(metric, block)
    perplexity = metrics.kind_of(metric).group == metrics.PERPLEXITY
    value = BoardColumn(
        "value" if perplexity else title, (title, "(mean)" if many else ""),
        lambda r: short(metric, q.value, q.stderr) if (q := r.quality.get(metric)) else "-",
        lambda r: _key(r, metric, lambda q: -(q.better.value if perplexity and q.better else q.value)),
    )  # fmt: skip
    if perplexity:
        times = BoardColumn(
            "perplexity", (title, "x dense"), lambda r: _of_dense(r, metric, first),
            lambda r: _key(r, metric, lambda q: -q.better.value if q.better else None),
            lambda r: _of_dense(r, metric, False),
        )  # fmt: skip
        return [value, times] if first else [times]
    if not first or not any(r.quality[metric].share for r in block.rows if metric in r.quality and r.keys):
        return [value]
    name, head = ("above", ("above", "guessing")) if metrics.kind_of(metric).chance else ("of dense", ("of", "dense"))
    part = BoardColumn(
        name, head, lambda r: _of_dense(r, metric, True),
        lambda r: _key(r, metric, lambda q: -q.share.value if q.share else None), lambda r: _of_dense(r, metric, False),
    )  # fmt: skip
    return [value, part]


def _title(metric: str, block: Block) -> str:
    """Return a metric's title, or its name if another metric of the block has that title, too."""
    title = metrics.title_of(metric)
    return title if [*map(metrics.title_of, block.tasks)].count(title) == 1 else metric


def _key(row: BoardRow, metric: str, key: Callable[[Quality], float | None]) -> float | None:
    return key(row.quality[metric]) if metric in row.quality else None


def _of_dense(row: BoardRow, metric: str, ends: bool) -> str:
    """Return the share of dense's quality, of a perplexity its multiple. ends: with those of the interval."""
    times, quality = metrics.kind_of(metric).group == metrics.PERPLEXITY, row.quality.get(metric)
    found = None if quality is None else quality.times if times else quality.share
    if found is None:
        return "-"
    shown = (found.interval or ()) if ends and row.kind not in (CONTROL, GUESSING) else ()
    return (multiple if times else percent)(found.value, *shown)


def _beside(row: BoardRow, text: str) -> str:
    return "-" if row.kind in (CONTROL, GUESSING) else text


def _ratio(row: BoardRow) -> float:
    return row.speed.speedup.median if row.speed and row.speed.speedup else 0.0


def _speed(row: BoardRow) -> str:
    if row.kind == CONTROL:
        return "1.00x"
    return "-" if row.speed is None else f"{_ratio(row):.2f}x" if row.speed.speedup else "none"


def lines(
    board: Board, width: int, explain: bool = False, sort: str | None = None, level: float | None = None
) -> list[str]:
    """Return the board in lines of at most `width` characters, if possible.

    Args:
        board: of one model.
        width: of the terminal.
        explain: whether to explain each column.
        sort: column that orders the rows of a level.
        level: read of the rows to show, beside dense.
    """
    text: list[str] = []
    for i, block in enumerate(board.blocks):
        head = heading(board, block) or f"{board.model}, {board.about}"
        text += [*([""] if i else []), *_head(head, sizes(board, block), width), *_wrapped(wins(block, level), width)]
        if block.at_chance:
            text += _wrapped(f"! {at_chance(block)}", width)
        text += _table(block, width, sort, level)
        for one in shown_levels(block, level):
            for said in one.sentences:
                text += _wrapped(said, width, " ", "   ")
    for note in [*notes(board), *(EXPLAINED if explain else ())]:
        text += _wrapped(note, width)
    return [printable(line).rstrip() for line in text]


def _wrapped(text: str, width: int, first: str = "", then: str = "") -> list[str]:
    """Wrap a text without separating a number from its per cent."""
    tied = text.replace(" %", "\u00a0%").replace("p < ", "p\u00a0<\u00a0")
    found = textwrap.wrap(tied, width, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in found]


def _head(left: str, right: str, width: int) -> list[str]:
    """Return the model and the documents, in one line if it fits."""
    if len(left) + len(right) + 3 <= width:
        return [f"{left}   {right}"]
    return [line for part in (left, right) for line in _wrapped(part, width)]


def sizes(board: Board, block: Block) -> str:
    """Return `7 choice tasks x 100, 2 texts x 32`, with the scope unless it is the default."""
    parts = []
    for metric, tasks in block.tasks.items():
        counts = sorted({row.values[t].n for row in block.rows for t in tasks if t in row.values})
        n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        kind = metrics.kind_of(metric)
        noun = "choice task" if kind.chance else "text" if kind.group == metrics.PERPLEXITY else "task"
        named = ", ".join(tasks) if len(tasks) <= NAMED_TASKS else f"{len(tasks)} {noun}s"
        parts.append(f"{named} x {n}")
    scope = f"scope {block.scope}: " if block.scope != DEFAULT_SCOPE and block is board.blocks[0] else ""
    return scope + "; ".join(parts)


def shown_levels(block: Block, level: float | None) -> list[Level]:
    """Return the levels of a block, or those near a read, and dense."""
    if level is None:
        return list(block.levels)
    return [
        one for one in block.levels if any(r.kind == CONTROL or abs(r.read - level) <= LEVEL_SHOWN for r in one.rows)
    ]


def ordered(rows: Sequence[BoardRow], columns: Sequence[BoardColumn], sort: str | None) -> list[BoardRow]:
    """Sort rows by a column, rows without a value last; without a column keep their order."""
    chosen = next((c for c in columns if c.name == sort), None)
    if chosen is None:
        return list(rows)
    keys = {id(row): chosen.key(row) for row in rows}
    return sorted(rows, key=lambda r: (keys[id(r)] is None, keys[id(r)] or 0.0))


def _table(block: Block, width: int, sort: str | None, level: float | None) -> list[str]:
    levels = shown_levels(block, level)
    rows = [row for one in levels for row in one.rows]
    if level is not None and not rows:
        return [f" no row reads about {percent(level)} of the FFN bytes"]
    columns = known = columns_of(block)
    first = [metric for metric in list(block.tasks)[1:] if metrics.kind_of(metric).group != metrics.PERPLEXITY]
    texts = {c: [c.text(r) for r in rows] for c in columns}  # two perplexities share a name
    name = min(WIDEST, max(len(name_of(r)) for r in rows))

    def total() -> int:
        return 11 + max(name, 6) + sum(2 + max(map(len, (*c.head, *texts[c]))) for c in columns)

    dropped: list[str] = []
    far = [c for c in columns if c.name in ("flips", "kl")]
    far = sorted(far, key=lambda c: -texts[c].count("-"))[: len(far) - 1]  # of two, the one that fewer rows have
    for out in ("memory", "work", *(_title(m, block) for m in first), *(c.name for c in far)):
        if total() > width and any(c.name == out for c in columns):
            columns = [c for c in columns if c.name != out]
            dropped.append(out)
    for column in columns:
        if total() > width and column.narrow:
            texts[column] = [column.narrow(r) for r in rows]
    name = max(NARROWEST, min(name, name - (total() - width))) if total() > width else name
    widths = [max(map(len, (*c.head, *texts[c]))) for c in columns]
    at = {id(row): i for i, row in enumerate(rows)}
    heads = (["FFN bytes", "read"], ["", "method"])
    made = [
        f"{heads[0][i]:<11}{heads[1][i]:<{name}}"
        + "".join(f"  {c.head[i]:<{w}}" for c, w in zip(columns, widths, strict=True))
        for i in (0, 1)
    ]
    for one in levels:
        for row in ordered(one.rows, known, sort):
            read = f"{read_of(row):>5}"
            label, *more = folded(name_of(row), name) if len(name_of(row)) > name else [name_of(row)]
            cells = [f"  {texts[c][at[id(row)]]:<{w}}" for c, w in zip(columns, widths, strict=True)]
            made.append(f"{read:<9}{MARKS.get(row.mark, ' ')} {label:<{name}}{''.join(cells)}")
            made += [f"{'':<11}{part}" for part in more]
    return [*made, *([f" (no room for {', '.join(dropped)}: --format md has all columns)"] if dropped else [])]


def name_of(row: BoardRow, name: str | None = None) -> str:
    """Return the name of a row, with a mark if its method is known from an abstract alone."""
    mark = " †" if row.label.partition(":")[0].partition(" ")[0] in ABSTRACTS else ""
    return (name or row.name) + mark


def read_of(row: BoardRow) -> str:
    """Return the share of the FFN bytes that a row reads, `≈` if it is about right alone; empty for guessing."""
    return "" if row.kind == GUESSING else "≈" * row.about + percent(row.read)


def wins(block: Block, level: float | None = None) -> str:
    """Return a sentence if rounding beats the best pruned row of a level."""
    won = [one for one in shown_levels(block, level) if one.rounding_wins]
    reads = [percent(row.read) for one in won for row in [r for r in one.rows if r.kind == PRUNED][:1]]
    return f"Rounding is better than the best pruned row at {', '.join(reads)}." if reads else ""


def at_chance(block: Block) -> str:
    """Say on which tasks dense is not above guessing by more than noise."""
    return f"dense is not significantly better than guessing on {', '.join(block.at_chance)}"


def heading(board: Board, block: Block) -> str:
    """Return what sets a block apart from the first one; empty for that one."""
    first = board.blocks[0]
    return "" if block is first else f"Scope {block.scope}:" if block.scope != first.scope else "On these tasks alone:"


def notes(board: Board) -> list[str]:
    """Return remarks on the numbers."""
    rows = board.rows
    found = [*board.notes]
    if any(name_of(row) != row.name for row in rows):
        found.append("† rebuilt from the abstract of its paper: no code was found.")
    if any(row.about for row in rows):
        found.append("≈: by the bits of the checkpoint's configuration, so that no test is made at equal reads.")
    bounds = [row.label for row in rows if row.kind == UPPER_BOUND]
    if bounds:
        found.append(f"Upper bounds, which look ahead: {', '.join(dict.fromkeys(bounds))}.")
    calibrated = [row.label for row in rows if row.calibrated]
    if calibrated:
        found.append(f"Calibrated on a text in advance: {', '.join(dict.fromkeys(calibrated))}.")
    shown_ones = {task for block in board.blocks for some in block.tasks.values() for task in some}
    missing = sorted(board.columns.keys() - shown_ones)
    if missing:
        found.append(f"Tasks left out of means, since some rows lack them: {', '.join(missing)} (see --view long).")
    return found


def table(board: Board, sort: str | None = None, level: float | None = None) -> list[Table]:
    """Return the board as tables with all columns, one per block."""
    made = []
    for block in board.blocks:
        columns = columns_of(block)
        body: list[list[str]] = []
        rules: set[int] = set()
        said: list[str] = []
        for one in shown_levels(block, level):
            rules |= {len(body)} if body else set()
            for row in ordered(one.rows, columns, sort):
                asked = sparsity(row.sparsity) if row.keys else ""
                mark = row.mark or ("" if row.kind == "pruned" else row.kind)
                body.append([read_of(row), name_of(row, row.label), asked, *(c.text(row) for c in columns), mark])
            said += one.sentences
        chance = [f"D{at_chance(block)[1:]}."] if block.at_chance else []
        last = [*notes(board), *EXPLAINED] if block is board.blocks[-1] else []
        title = f"{heading(board, block) or f'Board of {board.model}:'} {sizes(board, block)}"
        heads = ["FFN bytes read", "method", "sparsity", *(c.title for c in columns), ""]
        note = " ".join([*filter(None, [wins(block, level)]), *chance, *said, *last])
        made.append(Table(title, heads, body, note, rules=frozenset(rules)))
    return made
