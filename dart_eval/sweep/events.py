"""What happens in a run, for whoever shows it: a bar, a log, a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dart_eval.results.record import Record
    from dart_eval.sweep.plan import Cell


class Event(NamedTuple):
    """Something that happens in a run.

    Attributes:
        kind: wait (for a step, its text), note, about (the run), planned, or of a cell: started, answered, finished,
            failed.
        n: planned: cells that are finished; answered: requests since the last.
        of: planned: all cells; answered: all requests that are known of.
        where: the file that says why a cell failed.
    """

    kind: Literal["wait", "note", "about", "planned", "started", "answered", "finished", "failed"]
    text: str = ""
    cell: Cell | None = None
    n: int = 0
    of: int = 0
    record: Record | None = None
    where: Path | None = None


Tell = Callable[[Event], None]


def silent(event: Event) -> None:
    """Show nothing."""
