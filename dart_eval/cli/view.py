"""What a person sees of a run: a progress bar with the time left on a terminal, one line per finished cell anywhere."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dart_eval.results import metrics
from dart_eval.results.format import with_error
from dart_eval.results.writers import Table, data_text, finite, latex, markdown, pieces
from dart_eval.util import files
from dart_eval.util.text import Json, folded, json_text, printable

if TYPE_CHECKING:
    from rich.progress import Task, TaskID

    from dart_eval.results.record import Metric, Record
    from dart_eval.sweep.plan import Cell

NAMES = ("method", "claim", "cell", "cells")  # columns that may go over several lines
SHORTEST = 24  # characters of such a line
BESIDE = 46  # characters of a line of progress beside its title
EVERY = 30.0  # seconds between lines of a log on how far a cell is
LASTS = 5.0  # seconds between lines of a log on what a run waits for


class _TimeLeft(TimeRemainingColumn):
    """The time left, with its name beside the time that has passed; nothing where the end is unknown."""

    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " left") if task.total else Text()


@dataclass
class _Count:
    """Progress of a cell: its requests, its place, its start (seconds), answers, and those of an earlier run."""

    requests: int
    place: int
    start: float
    done: int = 0
    kept: int = 0

    def count(self, requests: int, fresh: bool) -> None:
        """Count answered requests. fresh: they were computed now, and not by an earlier run."""
        self.done += requests
        if not fresh:
            self.kept += requests

    def line(self, cells: int, title: str) -> str:
        """`cell 5 of 8, arc dense: 120 of 480 requests, about 6 min left in it`."""
        if self.done > self.requests:
            return f"cell {self.place} of {cells}, {title}: {self.done} requests, as a long text counts as several"
        left = (time.monotonic() - self.start) * (self.requests - self.done) / max(self.done - self.kept, 1)
        about = f"about {left / 60:.0f} min left in it" if left > 90 else f"about {left:.0f} s left in it"
        return f"cell {self.place} of {cells}, {title}: {self.done} of {self.requests} requests, {about}"


class TerminalView:
    """Progress of a run on stderr: bars on a terminal, lines in a log.

    A line of a log names what the run waits for, if that lasts, and from time to time the progress of a cell.
    """

    def __init__(self) -> None:
        self.console = console(stderr=True, soft_wrap=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            SpinnerColumn("line" if self.console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), _TimeLeft(),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip
        self._bar: TaskID | None = None  # of what is waited for
        self._all: TaskID  # of all cells
        self._cells: dict[str, TaskID] = {}  # the bars of cells under way, by key
        self._step = self._said = ""  # what is waited for, and what a log last said of it
        self._soon: object = None  # identifies the timer under way
        self._under_way: dict[str, _Count] = {}  # by key
        self._count, self._over, self._spoke = 0, 0, time.monotonic()  # cells, ended cells, time of the last line

    def __enter__(self) -> TerminalView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on()
        self.progress.stop()

    def status(self, text: str) -> None:
        """Show a step while no cell answers. A log names it if it lasts."""
        self._step = printable(text)
        if self.live and self._bar is not None:
            self.progress.update(self._bar, description=self._step)
        elif self.live:
            self._bar = self.progress.add_task(self._step, total=None)
        elif self._soon is None and self._step != self._said:
            self._soon = object()
            timer = threading.Timer(LASTS, self._say_step, [self._soon])
            timer.daemon = True
            timer.start()

    def _say_step(self, soon: object) -> None:
        if soon is not self._soon:
            return
        self._soon = None
        if self._step and self._step != self._said:
            self._said = self._step
            self._say(f"{self._step} ...")

    def _go_on(self) -> None:
        """Remove the step: nothing is waited for any more."""
        self._step = ""
        self._soon = None  # not cancelled: that takes a lock, which a signal can leave taken for good
        if self._bar is not None:
            self.progress.remove_task(self._bar)
            self._bar = None

    def planned(self, cells: int, finished: int) -> None:
        """Show the plan: the number of cells, and of those finished earlier."""
        self._go_on()
        if finished:
            self.console.print(f"{finished} of {cells} cells are finished already")
        self._count, self._over = cells, finished
        self._all = self.progress.add_task("all cells", total=cells, completed=finished)

    def started(self, cell: Cell, requests: int) -> None:
        """Begin the bar of a cell."""
        self._go_on()
        if cell.key not in self._cells:
            self._cells[cell.key] = self.progress.add_task(self._short(printable(cell.title)), total=requests)
            place = self._over + len(self._under_way) + 1
            self._under_way[cell.key] = _Count(requests, place, time.monotonic())

    def advanced(self, cell: Cell, requests: int, fresh: bool = True) -> None:
        """Count answered requests of a cell (see `_Count`). A log names a long cell from time to time."""
        if self.live:
            self._go_on()
        if cell.key in self._cells:
            self.progress.advance(self._cells[cell.key], requests)
            self._under_way[cell.key].count(requests, fresh)
            if not self.live and time.monotonic() - self._spoke > EVERY:
                self._say(self._under_way[cell.key].line(self._count, printable(cell.title)))

    def finished(self, cell: Cell, record: Record) -> None:
        """Print the line of a finished cell."""
        self._go_on()
        shown = ", ".join(
            f"{_place(m, record)}{m.metric} {with_error(m.metric, m.value, m.stderr)}" for m in headline(record.metrics)
        )
        more = f"{_some(record.remasks, 're-mask')}{_some(record.cut, 'cut prompt')}  {record.seconds:.0f} s"
        sparsity = f"  effective sparsity {record.effective_sparsity:.3f}"
        self._say(("done", "green"), f" {printable(cell.title):<34} {printable(shown)}{sparsity}{more}")
        self._next(cell)

    def failed(self, cell: Cell, error: str, where: Path) -> None:
        """Print the line of a failed cell."""
        self._go_on()
        self._say(("failed", "red"), f" {printable(cell.title):<32} {printable(error)} (traceback: {where})")
        self._next(cell)

    def note(self, text: str) -> None:
        """Print something that a person should know."""
        self._say((printable(text), "yellow"))

    def about(self, text: str) -> None:
        """Print what the run is, in a line at its beginning."""
        self._go_on()
        self._say(printable(text))

    def _say(self, *parts: str | tuple[str, str]) -> None:
        self._spoke = time.monotonic()
        self.console.print(Text.assemble(*parts))

    def _short(self, title: str) -> str:
        """Return a title that leaves room for its bar and the times beside it."""
        room = max(20, self.console.width - BESIDE)
        return title if len(title) <= room else f"{title[: room - 1]}…"

    def _next(self, cell: Cell) -> None:
        self.progress.advance(self._all)
        self._over += 1
        self._under_way.pop(cell.key, None)
        if cell.key in self._cells:
            self.progress.remove_task(self._cells.pop(cell.key))


def headline(found: Sequence[Metric]) -> list[Metric]:
    """Return the one number per task that a line shows."""
    own = [m for m in found if m.part_of is None]
    return metrics.main(own) or own[:1]


def _place(metric: Metric, record: Record) -> str:
    return "" if metric.task == record.inputs["task"] else f"{metric.task} "


def _some(count: int | None, what: str) -> str:
    """Return a count after a comma; nothing for none."""
    return f", {count} {what}{'s' if count > 1 else ''}" if count else ""


def settle_streams() -> None:
    """Write UTF-8 to files and pipes, whatever the locale; spell out what a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def console(stderr: bool = False, soft_wrap: bool = False, width: int | None = None) -> Console:
    """Return a terminal that shows texts as they are: no word is coloured or replaced by an emoji."""
    return Console(highlight=False, emoji=False, stderr=stderr, soft_wrap=soft_wrap, width=width)


def problem(text: str) -> None:
    """Print an error on stderr."""
    console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "red"), f" {printable(text)}"))


def say(text: str, err: bool = False) -> None:
    """Print lines for a person."""
    print(printable(text, lines=True), file=sys.stderr if err else sys.stdout, flush=True)


def listed(rows: Sequence[tuple[str, str]], least: int = 0) -> None:
    """Print two columns, the left one at least `least` characters wide; lines on a terminal fit into it."""
    width = max([least, *(len(left) for left, _ in rows)])
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for left, text in rows:
        say(hanging(f"{left:<{width}}", text, room))


def hanging(left: str, text: str, room: int | None) -> str:
    """Return `left`, then `text`, wrapped below itself at `room` characters; None: not wrapped."""
    indent = len(left) + 2
    if room is None or not text:
        return f"{left}  {text}".rstrip()
    if room - indent < SHORTEST:  # too narrow for two columns
        indent = len(left) - len(left.lstrip()) + 4
        return f"{left.rstrip()}\n" + textwrap.indent(textwrap.fill(text, max(room - indent, SHORTEST)), " " * indent)
    lines = textwrap.wrap(text, room - indent, break_on_hyphens=False, break_long_words=False)
    return f"{left}  " + f"\n{' ' * indent}".join(lines)


def put(text: str, path: Path | None = None) -> None:
    """Print a text for a person or a program, as it is, or write it to a file that the user named.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        sys.stdout.write(printable(text, lines=True))
        return
    stream = files.is_stream(path)
    files.write(path, text)
    if not stream:
        say(f"wrote {path}")


def output(data: list[Json], tables: Sequence[Table], format: str) -> None:
    """Print data as `json` or `csv`, or their tables as `md`, `tex` or for the terminal."""
    if format == "json":
        say(json_text(finite(data)))
    elif format == "csv":
        put(data_text(data, "csv"))
    elif format in ("md", "tex"):
        say("\n".join(map(markdown if format == "md" else latex, tables)))
    else:
        for i, table in enumerate(tables):
            if i:
                print()
            show(table)


def show(table: Table) -> None:
    """Print a table on the terminal.

    Where it is wider than the terminal, it comes in pieces of fewer columns, and names of methods go over several
    lines. No number is broken.
    """
    screen = console()
    if not table.body:
        screen.print(Text(printable(table.title)))
    for piece in pieces(table, screen.width, SHORTEST) if table.body else ():
        cells = [[printable(cell) for cell in row] for row in piece.body]
        over = _width(piece.columns, cells) - screen.width
        for j, name in enumerate(piece.columns):
            if over > 0 and name in NAMES:
                most = max(SHORTEST, max(cell_len(row[j]) for row in cells) - over)
                for row in cells:
                    row[j] = "\n".join(folded(row[j], most))
        width = max(screen.width, _width(piece.columns, cells))
        console(width=width, soft_wrap=True).print(_drawn(piece, cells))
    screen.print(Text(printable(table.note), "dim"))


def _drawn(table: Table, cells: Sequence[Sequence[str]]) -> rich.table.Table:
    """Return the table with these texts in its cells."""
    title = Text(printable(table.title))
    drawn = rich.table.Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for name, number in zip(table.columns, table.numbers, strict=True):
        drawn.add_column(Text(printable(name)), justify="right" if number else "left", no_wrap=True)
    for i, row in enumerate(cells):
        if i in table.rules:
            drawn.add_section()
        drawn.add_row(*(Text(cell, "bold" if (i, j) in table.bold else "") for j, cell in enumerate(row)))
    return drawn


def _width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Return the characters of a table's lines: the widest text of each column, and a gap or the edges."""
    texts = zip(columns, *cells, strict=True)
    return sum(2 + max(cell_len(line) for text in column for line in text.split("\n")) for column in texts)


def print_note(text: str) -> None:
    """Print something that a person should know, apart from the results."""
    say(text, err=True)
