"""The board for people: as lines for a terminal of any width, and as a table for Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dart_eval.results import metrics
from dart_eval.results.board import BEST, CONTROL, LEVEL_WITH_BEST, UPPER_BOUND, USUAL, Board, Row, granularity
from dart_eval.results.format import share, short, size, small_share, sparsity
from dart_eval.results.recovery import Recovery
from dart_eval.results.writers import Table
from dart_eval.text import folded, printable

MARKS = {BEST: "*", LEVEL_WITH_BEST: "~"}
MOST_TASKS = 4  # that have a column each; of more, each metric has one, which is their mean
NATS = "log-lik."
FOLDED = 28  # characters of a name that goes over several lines before a column is left out
NARROWEST = 12  # characters of a method's name, where the terminal is narrow

Column = tuple[str, Callable[[Row], str]]


def lines(board: Board, width: int) -> list[str]:
    """The board in lines of at most `width` characters where that can be, a level of read after the other."""
    columns, left_out = columns_of(board), []
    longest = max(len(_name(row)) for row in board.rows)
    for dropped in (NATS, "overhead", "extra"):  # the long tables have them
        if min(longest, FOLDED) + _others(board, columns) <= width:
            break
        left_out += [head for head, _ in columns if head == dropped]
        columns = [c for c in columns if c[0] != dropped]
    names = max(NARROWEST, min(longest, width - _others(board, columns)))
    text = [*rounding_note(board), f"Model {board.model}" + tasks_note(board)]
    heads = [head for head, _ in columns]
    cells = {row.keys: [value(row) for _, value in columns] for row in board.rows}
    widths = [max(len(head), *(len(line[i]) for line in cells.values())) for i, head in enumerate(heads)]
    widths[0] = min(widths[0], names)
    text += ["", _line(heads, widths)]
    for level in board.levels:
        text.append(f"{level_name(level.rows)} ".ljust(sum(widths) + 2 * len(widths) - 2, "─"))
        for row in level.rows:
            text += _row_lines(cells[row.keys], widths)
    notes = legend(board, columns)
    if left_out:
        notes[-1] += f" Left out, for want of room: {', '.join(reversed(left_out))} (--format md has all columns)."
    return [printable(line) for line in [*text, "", *notes]]


def columns_of(board: Board) -> list[Column]:
    """Heads, and what stands under them for a row: the method first."""
    rows = board.rows
    found: list[Column] = [("method", _name), *_quality(board)]
    if any(row.recovery for row in rows):
        found.append(("recovery", _recovery))
    if any(row.nats for row in rows):
        found.append((NATS, _nats))
    found += [("extra", lambda row: size(row.memory)), ("overhead", lambda row: small_share(row.overhead))]
    if any(row.speed for row in rows):
        found.append(("speed", _speed))
    return found


def _speed(row: Row) -> str:
    speed = row.speed
    return "-" if speed is None else f"{speed.speedup.median:.2f}x" if speed.speedup else speed.times


def _quality(board: Board) -> list[Column]:
    """A column a task, or where there are many a column a metric."""
    if len(board.columns) <= MOST_TASKS:
        return [(task, lambda row, task=task: _value(row, [task])) for task in board.columns]  # type: ignore[misc]
    return [
        (
            tasks[0] if len(tasks) == 1 else f"{metrics.of(metric).short or metric} of {len(tasks)}",
            lambda row, tasks=tasks: _value(row, tasks),  # type: ignore[misc]
        )
        for metric, tasks in _by_metric(board).items()
    ]


def _by_metric(board: Board) -> dict[str, list[str]]:
    """Main metric -> its tasks, in the order of the columns."""
    found: dict[str, list[str]] = {}
    for task, metric in board.columns.items():
        found.setdefault(metric, []).append(task)
    return found


def _value(row: Row, tasks: Sequence[str]) -> str:
    """The mean of some tasks' main metrics, which are all of one name."""
    found = [row.values[t] for t in tasks if t in row.values]
    if len(found) < len(tasks):
        return "-"
    errors = [m.stderr for m in found if m.stderr is not None]
    stderr = sum(e * e for e in errors) ** 0.5 / len(found) if len(errors) == len(found) else None
    return short(found[0].metric, sum(m.value for m in found) / len(found), stderr)


def _name(row: Row) -> str:
    return f"{MARKS.get(row.mark, ' ')} {row.name}"


def _nats(row: Row) -> str:
    return _estimate(row, row.nats, "0.0", lambda v: f"{v:+.1f}", "")


def _recovery(row: Row) -> str:
    return _estimate(row, row.recovery, "100 %", lambda v: f"{100 * v:3.0f}", " %")


def _estimate(row: Row, found: Recovery | None, of_dense: str, text: Callable[[float], str], unit: str) -> str:
    """A mean over tasks with its interval; of dense what it is by definition."""
    if found is None:
        return of_dense if row.kind == CONTROL else "-"
    ends = "" if found.interval is None else f" [{', '.join(map(text, found.interval))}]"
    return f"{text(found.value).strip()}{unit}{ends}"


def level_name(rows: Sequence[Row]) -> str:
    """`sparsity 70 %, read 0.30`; before it what is left out, where that is no neurons, and any scope but ours.

    Where there are several sparsities, each row names its own.
    """
    of = f"{granularity(rows[0])}, " if rows and granularity(rows[0]) else ""
    scope = next((row.scope for row in rows if row.scope), USUAL)
    of = of if scope == USUAL else f"scope {scope}, {of}"
    known = {row.sparsity for row in rows if row.sparsity is not None}
    reads = sorted({share(row.read) for row in rows})
    read = reads[0] if len(reads) == 1 else f"{reads[0]} to {reads[-1]}"
    return of + (f"sparsity {sparsity(*known)}, read {read}" if len(known) == 1 else f"read {read}")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left, *rest = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join([left, *rest]).rstrip()


def _row_lines(cells: list[str], widths: Sequence[int]) -> list[str]:
    """A row; a name that is too long goes on in lines of its own, broken between its parts."""
    name, rest = cells[0], cells[1:]
    if len(name) <= widths[0]:
        return [_line(cells, widths)]
    mark, label = name[:2], name[2:]
    first, *more = folded(label, widths[0] - len(mark))
    return [_line([f"{mark}{first}", *rest], widths), *(f"  {line}" for line in more)]


def _others(board: Board, columns: Sequence[Column]) -> int:
    """Characters of all columns but the first, with the gaps before them."""
    rows = board.rows
    return sum(max(len(head), *(len(value(row)) for row in rows)) + 2 for head, value in columns[1:])


def tasks_note(board: Board) -> str:
    """Which number of each task is shown: said once."""

    def with_size(task: str) -> str:
        sizes = sorted({row.values[task].n for row in board.rows if task in row.values})
        return f"{task} (n {sizes[0]})" if len(sizes) == 1 else f"{task} (n {sizes[0]} to {sizes[-1]})"

    said = [f"{metric} of {', '.join(map(with_size, tasks))}" for metric, tasks in _by_metric(board).items()]
    return f": {'; '.join(said)}" if said else ""


def rounding_note(board: Board) -> list[str]:
    """The first line, where rounding alone beats every pruned row of a level; else none."""
    wins = [share(max(row.read for row in level.rows)) for level in board.levels if level.rounding_wins]
    return [f"At read {', '.join(wins)} rounding alone keeps more than any pruned row."] if wins else []


def legend(board: Board, columns: Sequence[Column]) -> list[str]:
    """What was best at each level, and what the columns mean, each once."""
    shown = {head for head, _ in columns}
    rows = board.rows
    text = [level.verdict for level in board.levels if level.verdict]
    said = ["Value ± standard error, shares in per cent."]
    if any(row.mark for row in rows):
        said.append("* best pruned row of its level; ~ not told apart from it.")
    if "recovery" in shown:
        said.append("recovery: quality over dense's on the same documents, mean over tasks [95 % interval].")
    if NATS in shown:
        said.append(f"{NATS}: log-likelihood of right answers less dense's, nats per answer [95 % interval].")
    if len({row.tasks for row in rows if row.recovery}) > 1:
        said.append("A row that lacks a task (-) stands last in its level and takes no part in the test.")
    said.append("read: share of the FFN weights that a token reads.")
    if "extra" in shown:
        said.append("extra: memory kept beside the model.")
    if "overhead" in shown:
        said.append("overhead: FLOPs that the method adds to a token.")
    if "speed" in shown:
        said.append("speed: of decoding, over dense, as `bench decode` measured it.")
        if any(row.speed and row.speed.speedup is None for row in rows):
            said.append("bytes only: no kernel there makes the bytes into time.")
    if any(row.scope not in (None, USUAL) for row in rows):
        said.append("scope: which positions ran pruned when answers were scored; compare rows of one scope.")
    bounds = [row.name for row in rows if row.kind == UPPER_BOUND]
    if bounds:
        said.append(f"Upper bounds, which know what no method can know in time: {', '.join(dict.fromkeys(bounds))}.")
    calibrated = [row.label for row in rows if row.calibrated]
    if calibrated:
        said.append(f"Calibrated on a text before any prompt: {', '.join(dict.fromkeys(calibrated))}.")
    if any(granularity(row) for row in rows):
        said.append("Rows that leave out input channels, single weights or experts for all take no part in the tests.")
    return [*text, " ".join([*said, *board.notes])]


def table(board: Board) -> Table:
    """The board as a table with all its columns, whatever their width."""
    columns = [
        ("method", lambda row: row.name),
        ("sparsity", lambda row: "-" if row.sparsity is None else sparsity(row.sparsity)),
        ("read", lambda row: share(row.read)),
        *columns_of(board)[1:],
        ("", lambda row: row.mark or ("" if row.kind == "pruned" else row.kind)),
    ]  # fmt: skip
    body: list[list[str]] = []
    rules: set[int] = set()
    for level in board.levels:
        if body:
            rules.add(len(body))
        body += [[value(row) for _, value in columns] for row in level.rows]
    note = " ".join([*rounding_note(board), *legend(board, columns)])
    return Table(f"Board of {board.model}", [head for head, _ in columns], body, note, rules=frozenset(rules))
