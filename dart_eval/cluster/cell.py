"""What runs on a node of Ray: one cell. It holds no files; the driver writes what it returns."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.results.record import Record
from dart_eval.results.store import Journal
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import RunConfig
from dart_eval.util.errors import UserError, summary
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from dart_eval.sweep.worker import Worker


@dataclass(frozen=True)
class Made:
    """A cell's answers and the time they took here; its record and texts, or why it failed, in a line and in full."""

    journal: Journal
    seconds: float
    record: Record | None = None
    texts: tuple[Json, ...] = ()
    failure: tuple[str, str] = ("", "")


def run_cell(config: RunConfig, key: str, journal: Journal, common: RunConfig, folder: str) -> Made:
    """Run a cell on this node.

    Args:
        config: with the cell's task alone. common: how the model of all cells is loaded.
        journal: of the driver, to be continued. folder: the driver's, from which relative paths count.
    """
    import torch

    from dart_eval.sweep.run import plan_all
    from dart_eval.util.quiet import silence

    silence()
    with contextlib.suppress(OSError):  # where there is no such folder, paths must be absolute
        os.chdir(folder)
    if common.device == "cpu":
        torch.set_num_threads(1)  # the one that Ray gives
    start, journal.path = time.monotonic(), None
    try:
        worker = _loaded(common)
        # Own copies of the tasks: a run writes into lm-eval's, which would change their hashes.
        cells, _ = plan_all([config], silent, False, common.device, worker.resolved)
        if key not in cells:
            problem = "this node would evaluate another cell than the driver planned"
            raise UserError(problem, "install the same versions and give every node the same model and --data-dir")
        outcome, record = worker.run(cells[key], journal)
    except Exception as error:
        failure = summary(error), "".join(traceback.format_exception(error))
        return Made(journal, time.monotonic() - start, failure=failure)
    return Made(journal, time.monotonic() - start, record, tuple(outcome.texts))


@functools.lru_cache(maxsize=1)
def _loaded(common: RunConfig) -> Worker:
    """Load the model; Ray runs one cell after another in a process without a GPU."""
    from dart_eval.models.loading import resolve
    from dart_eval.sweep.worker import Worker

    return Worker(resolve(common), silent)
