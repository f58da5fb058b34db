"""Run all cells of a configuration in this process, one after the other.

Wrong input that can be seen beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs and before anything is written. An error that shows only inside a cell fails that cell alone. A stopped run
continues: finished cells are skipped, and a cell under way resumes after its last finished batch. Several processes may
share an output folder: each cell is claimed by one of them.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dart_eval.models.loading import resolve
from dart_eval.sweep.jobs import Job, RunResult, Sweep, View, begin_sweep, count_requests
from dart_eval.sweep.options import RunConfig
from dart_eval.util.errors import StoreError, summary

if TYPE_CHECKING:
    from dart_eval.models.loaded import Loaded

log = logging.getLogger(__name__)


def run_all(
    configs: Sequence[RunConfig], view: View, skip_missing: bool = False, model: Loaded | None = None,
    since: float | None = None,
) -> RunResult:  # fmt: skip
    """See `cluster.run.run_all`; the model is loaded once, and a cell of several sweeps runs once.

    Args:
        since: of a worker, see `Sweep`.
    """
    sweep = begin_sweep(configs, view, skip_missing, model.model.device.type if model else None, model, since)
    return run_rest(sweep, configs[0], model)


def run_rest(sweep: Sweep, config: RunConfig, model: Loaded | None = None) -> RunResult:
    """Run the cells of a sweep that are not finished."""
    if sweep.todo:
        from dart_eval.sweep.worker import Worker  # with transformers' models it takes seconds

        worker = Worker(config, model or resolve(config), sweep.view)

    def work(todo: list[Job]) -> None:
        for job in todo:
            cell = job.cell
            with sweep.claim(job) as journal:
                if journal is None:
                    continue
                try:
                    sweep.view.started(cell, count_requests(job.tasks.load(cell.task), job.config.limit))
                    with _marked(sweep, job):
                        outcome, record = worker.run(job, journal)
                        sweep.save(cell, record, outcome.texts, journal)
                except StoreError:
                    raise  # the next cell could not be kept either
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    log.debug("cell %s failed:\n%s", cell.name, text)
                    sweep.fail(cell, summary(error), text)

    return sweep.work_through(work)


@contextlib.contextmanager
def _marked(sweep: Sweep, job: Job) -> Iterator[None]:
    """While the block runs, mark a cell in a worker: if its process is killed, the others leave the cell."""
    if sweep.since is None:
        yield
        return
    try:
        sweep.store.failed(job.cell.name, job.cell.key, "the process at work on it was killed")
        yield
    finally:  # on a signal, too
        sweep.store.file("failed", job.cell.name, job.cell.key).unlink(missing_ok=True)
