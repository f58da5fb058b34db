"""What a person sees of a run: a progress bar with the time left on a terminal, one line per finished cell anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
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

from dart_eval import files
from dart_eval.results.record import Metric, Record
from dart_eval.results.tables import tables
from dart_eval.results.writers import Table, finite, markdown

TEXTS = ("task", "method", "model", "scope", "cells", "cell", "metric", "better", "verdict", "why")  # set left
HEADLINE = ("acc", "rougeL", "word_perplexity", "exact_match")  # the first of these is a cell's one number


class _TimeLeft(TimeRemainingColumn):
    """With its name, as it stands beside the time that has passed; nothing where the end is unknown."""

    def render(self, task: Any) -> Text:
        return Text.assemble(super().render(task), " left") if task.total else Text()


class TerminalView:
    """Progress of a run, as the executor reports it. Lines go to stdout; the bar only where stdout is a terminal."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.live = self.console.is_terminal
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), _TimeLeft(),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip
        self._bar: Any = None  # of what comes before the first cell
        self._all: Any = None
        self._cells: dict[str, Any] = {}  # the bars of cells under way, by key

    def __enter__(self) -> TerminalView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def status(self, text: str) -> None:
        """A step before the first cell."""
        if self._bar is None:
            self._bar = self.progress.add_task(text, total=None)
        else:
            self.progress.update(self._bar, description=text)

    def planned(self, cells: int, finished: int) -> None:
        """The plan: how many cells, how many of them were finished earlier."""
        if finished:
            self.console.print(f"{finished} of {cells} cells are finished already")
        if self._bar is not None:
            self.progress.remove_task(self._bar)
            self._bar = None
        self._all = self.progress.add_task("all cells", total=cells, completed=finished)

    def started(self, cell: Any, requests: int) -> None:
        """A cell begins."""
        if self._bar is not None:
            self.progress.remove_task(self._bar)
            self._bar = None
        if cell.key not in self._cells:
            self._cells[cell.key] = self.progress.add_task(cell.title, total=requests)

    def advanced(self, cell: Any, requests: int) -> None:
        """Requests of a cell under way were answered."""
        if cell.key in self._cells:
            self.progress.advance(self._cells[cell.key], requests)

    def finished(self, cell: Any, record: Record) -> None:
        """A cell's line."""
        shown = ", ".join(f"{_place(m, record)}{m.metric} {_number(m)}" for m in headline(record.metrics))
        self.console.print(
            f"[green]done[/green] {escape(cell.title):<34} {escape(shown)}"
            f"  effective sparsity {record.effective_sparsity:.3f}"
            f"{f', {record.remasks} re-masks' if record.remasks else ''}  {record.seconds:.0f} s"
        )
        self._next(cell)

    def failed(self, cell: Any, error: str, where: Path) -> None:
        """A failed cell's line."""
        self.console.print(
            f"[red]failed[/red] {escape(cell.title):<32} {escape(error)} (traceback: {escape(str(where))})"
        )
        self._next(cell)

    def note(self, text: str) -> None:
        """Something a person should know."""
        self.console.print(escape(text), style="yellow")

    def _next(self, cell: Any) -> None:
        self.progress.advance(self._all)
        if cell.key in self._cells:
            self.progress.remove_task(self._cells.pop(cell.key))


def headline(metrics: Sequence[Metric]) -> list[Metric]:
    """The one number per task that a line shows."""
    chosen = {}
    for m in metrics:
        if m.part_of is None and m.metric in HEADLINE and m.task not in chosen:
            chosen[m.task] = m
    return list(chosen.values()) or [m for m in metrics if m.part_of is None][:1]


def _place(metric: Metric, record: Record) -> str:
    return "" if metric.task == record.inputs["task"] else f"{metric.task} "


def _number(m: Metric) -> str:
    digits = 4 if abs(m.value) < 10 else 2
    return f"{m.value:.{digits}f}" + (f" ± {m.stderr:.{digits}f}" if m.stderr is not None else "")


def print_tables(records: Sequence[Record], more: Sequence[Table] = ()) -> None:
    """The tables of a run, then `more`."""
    for table in [*tables(records), *more]:
        show(table)
        print()


def output(data: list[dict[str, Any]], table: Table, format: str) -> None:
    """Data as `json`, or their table as `md` or for the terminal."""
    if format == "json":
        typer.echo(json.dumps(finite(data), indent=1))
    elif format == "md":
        typer.echo(markdown(table))
    else:
        show(table)


def show(table: Table) -> None:
    """A table on the terminal, every column whole: a line longer than the terminal is wide wraps, no number is lost."""
    console = Console(highlight=False)
    if not table.body:
        console.print(f"{escape(table.title)}\n[dim]{escape(table.note)}[/dim]")
        return
    shown = rich.table.Table(
        title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in table.columns:
        shown.add_column(escape(column), justify="left" if column in TEXTS else "right", no_wrap=True)
    for i, row in enumerate(table.body):
        if i in table.rules:
            shown.add_section()
        shown.add_row(*(f"[bold]{escape(c)}[/bold]" if (i, j) in table.bold else escape(c) for j, c in enumerate(row)))
    width = Measurement.get(console, console.options.update_width(1000), shown).maximum
    Console(highlight=False, width=max(console.width, width), soft_wrap=True).print(shown)
    console.print(escape(table.note), style="dim")


def save_text(path: Path, text: str) -> None:
    """Write a file that the user named; said where it is one to be found again, not a stream.

    Raises:
        UserError: it cannot be written.
    """
    stream = files.is_stream(path)
    files.write(path, text)
    if not stream:
        typer.echo(f"wrote {path}")
