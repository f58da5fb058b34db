"""What a person sees of a run: a progress bar with the time left on a terminal, one line per finished cell anywhere."""

from __future__ import annotations

import functools
import io
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress
from rich.console import Console
from rich.text import Text

from dart_eval.results import metrics
from dart_eval.results.metrics import with_error
from dart_eval.util import files
from dart_eval.util.text import counted, printable

if TYPE_CHECKING:
    from dart_eval.results.record import Record
    from dart_eval.results.show import Table
    from dart_eval.sweep.events import Event
    from dart_eval.sweep.plan import Cell

BESIDE = 46  # characters of a line of progress beside its title
EVERY = 30.0  # seconds between lines of a log on how far a cell is
LASTS = 5.0  # seconds between lines of a log on what a run waits for
SPEED_OF = 3600.0  # seconds over which the time left is estimated: a batch may take minutes


class _TimeLeft(progress.TimeRemainingColumn):
    def render(self, task: progress.Task) -> Text:
        return Text.assemble(super().render(task), " left" if task.total else "")


class TerminalView:
    """Shows the events of a run, or of any command that waits, on stderr: bars on a terminal, lines in a log.

        with TerminalView() as tell:
            tell(Event("wait", "loading the model"))

    A log names what lasts, and from time to time how far a cell is.
    """

    def __init__(self) -> None:
        self.console = console(stderr=True, soft_wrap=True)
        self.live = self.console.is_terminal
        self.progress = progress.Progress(
            progress.SpinnerColumn("line" if self.console.options.ascii_only else "dots"),
            progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
            progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), _TimeLeft(), console=self.console,
            transient=True, disable=not self.live, speed_estimate_period=SPEED_OF,
        )  # fmt: skip
        self._step = self._said = ""  # what is waited for, and what a log last said of it
        self._bar: progress.TaskID | None = None  # of that
        self._all: progress.TaskID  # of all cells
        self._cells: dict[str, progress.TaskID] = {}  # the bars of cells under way, by key
        self._over = 0  # cells that have ended
        self._open, self._spoke = False, 0.0  # whether the block runs; when the last line was written

    def __enter__(self) -> TerminalView:
        self._open, self._spoke = True, time.monotonic()
        self.progress.start()
        if not self.live:
            threading.Thread(target=self._name_what_lasts, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False  # the thread is not waited for: that takes a lock, which a signal can leave taken for good
        self._end_step()
        self.progress.stop()

    def _name_what_lasts(self) -> None:
        while self._open:
            time.sleep(min(1.0, LASTS / 5))
            if not self.live and self._step not in ("", self._said) and time.monotonic() - self._spoke > LASTS:
                self._said = self._step
                self._say(f"{self._step} ...")

    def __call__(self, event: Event) -> None:
        """Show an event."""
        text, cell = printable(event.text), event.cell
        if event.kind == "wait":
            if not self._step:
                self._spoke = time.monotonic()
            self._step = text
            if self._bar is not None:
                self.progress.update(self._bar, description=text)
            elif self.live:
                self._bar = self.progress.add_task(text, total=None)
            return
        if event.kind not in ("note", "answered") or (event.kind == "answered" and self.live):
            self._end_step()
        if event.kind in ("note", "about"):
            self._say((text, "yellow" if event.kind == "note" else ""))
        elif event.kind == "planned":
            if event.n:
                self._say(f"{event.n} of {event.of} cells are finished already")
            self._over = event.n
            self._all = self.progress.add_task("all cells", total=event.of, completed=event.n)
        elif cell is not None:
            self._show_cell(event, cell, self._cells.get(cell.key))

    def _show_cell(self, event: Event, cell: Cell, bar: progress.TaskID | None) -> None:
        title = printable(cell.title)
        if event.kind == "started" and bar is None:
            room = max(20, self.console.width - BESIDE)
            short = title if len(title) <= room else f"{title[: room - 1]}…"
            place = self._over + len(self._cells) + 1
            self._cells[cell.key] = self.progress.add_task(short, total=None, title=title, place=place)
        elif event.kind == "answered" and bar is not None:
            self.progress.update(bar, advance=event.n, total=event.of)
            if not self.live and time.monotonic() - self._spoke > EVERY:
                self._say(self._how_far(bar))
        elif event.kind in ("finished", "failed"):
            if event.record is not None:
                self._say(("done", "green"), f" {title:<34} {printable(_numbers(event.record))}")
            else:
                self._say(("failed", "red"), f" {title:<32} {printable(event.text)} (traceback: {event.where})")
            self.progress.advance(self._all)
            self._over += 1
            if self._cells.pop(cell.key, None) is not None and bar is not None:
                self.progress.remove_task(bar)

    def _how_far(self, bar: progress.TaskID) -> str:
        """`cell 5 of 8, arc dense: 120 of 480 requests, about 6 min left in it`."""
        cell, every = (self.progress.tasks[self.progress.task_ids.index(i)] for i in (bar, self._all))
        where = f"cell {cell.fields['place']} of {every.total:.0f}, {cell.fields['title']}"
        text, left = f"{where}: {cell.completed:.0f} of {cell.total:.0f} requests", cell.time_remaining
        if left is None:
            return text
        return f"{text}, about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left in it"

    def _end_step(self) -> None:
        """Nothing is waited for any more."""
        self._step = ""
        if self._bar is not None:
            self.progress.remove_task(self._bar)
            self._bar = None

    def _say(self, *parts: str | tuple[str, str]) -> None:
        self._spoke = time.monotonic()
        self.console.print(Text.assemble(*parts))


def _numbers(record: Record) -> str:
    """Return what the line of a finished cell shows: the main metric of each task, and what is unusual."""
    own = [m for m in record.metrics if m.part_of is None]
    shown = ", ".join(
        f"{'' if m.task == record.inputs['task'] else f'{m.task} '}{m.metric} {with_error(m.metric, m.value, m.stderr)}"
        for m in metrics.main(own) or own[:1]
    )
    counts = [counted(n, what) for n, what in ((record.remasks, "re-mask"), (record.cut, "cut prompt")) if n]
    read = f"read {100 * record.weights_read:.3g} %"
    return f"{shown}  {', '.join([read, *counts])}  {record.measured['seconds']:.0f} s"


def settle_streams() -> None:
    """Write UTF-8 to files and pipes, whatever the locale; spell out what a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def console(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a terminal that shows texts as they are: no word is coloured or replaced by an emoji."""
    return Console(highlight=False, emoji=False, stderr=stderr, soft_wrap=soft_wrap)


def problem(text: str) -> None:
    """Print an error on stderr."""
    console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "red"), f" {printable(text)}"))


def say(text: str, err: bool = False) -> None:
    """Print lines for a person."""
    print(printable(text, lines=True), file=sys.stderr if err else sys.stdout, flush=True)


def listed(rows: Sequence[tuple[str, str]], least: int = 0) -> None:
    """Print two columns, the left one at least `least` characters wide; on a terminal the right one is wrapped."""
    width = max([least, *(len(left) for left, _ in rows)])
    room = max(shutil.get_terminal_size().columns, width + 24) if sys.stdout.isatty() else 0
    for left, text in rows:
        line = f"{left:<{width}}  {text}".rstrip()
        say(textwrap.fill(line, room, subsequent_indent=" " * (width + 2), break_on_hyphens=False) if room else line)


def put(data: str | bytes, path: Path | None = None, force: bool = False) -> None:
    """Print a text for a person or a program, as it is, or write data to a file that the user named.

    Raises:
        UserError: the file cannot be written, or holds something else and `force` is not given.
    """
    if path is None:
        sys.stdout.write(printable(str(data), lines=True))
        return
    if not force:
        files.refuse_foreign(path, data)
    files.write(path, data)
    if not files.is_stream(path):
        say(f"wrote {path}")


def for_terminal(format: str | None) -> bool:
    """Whether a format (None: not given) means tables drawn for a terminal."""
    return format == "table" or (format is None and sys.stdout.isatty())


def output(tables: Sequence[Table], format: str | None = None, path: Path | None = None, force: bool = False) -> None:
    """Print tables, or write them to a file that the user named.

    Args:
        format: one of `options.FORMATS`; None: a table on a terminal, else md. In a file a table is md, too.
        force: whether the file may hold something else.
    """
    from dart_eval.results.show import render, show  # slow to import: not for `--help`

    if path is None and for_terminal(format):
        show(*tables)
    else:
        put(render(tables, "md" if format in (None, "table") else format), path, force)


print_note = functools.partial(say, err=True)  # what a person should know, apart from the results
