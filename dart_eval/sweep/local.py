"""Run all cells of a configuration in this process, one after the other.

Wrong input that can be seen beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs and before anything is written. An error that shows only inside a cell fails that cell alone. A stopped run
continues: finished cells are skipped, and a cell under way resumes after its last finished batch. Several processes may
share an output folder: each cell is claimed by one of them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dart_eval.models.loading import resolve
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import Job, RunResult, View, begin_sweep, count_requests, open_cell
from dart_eval.util.errors import StoreError, summary

if TYPE_CHECKING:
    from dart_eval.models.loaded import Loaded
    from dart_eval.sweep.worker import Worker

log = logging.getLogger(__name__)


def run_all(
    configs: Sequence[RunConfig], view: View, skip_missing: bool = False, model: Loaded | None = None,
    since: float | None = None,
) -> RunResult:  # fmt: skip
    """See `cluster.run.run_all`; the model is loaded once, and a cell of several sweeps runs once.

    Args:
        since: start of the workers that share this run, in seconds since the epoch. A cell that one of them has
            finished or failed is not tried by another.
    """
    sweep = begin_sweep(configs, view, skip_missing, model.device if model else None, model)
    running: Job | None = None
    if sweep.todo:
        from dart_eval.sweep.worker import Worker  # with transformers' models it takes seconds

        worker = Worker(
            configs[0],
            model or resolve(configs[0].model_spec),
            view.status,
            lambda n, fresh: view.advanced(running.cell, n, fresh) if running else None,
            view.note,
        )

    def work(todo: list[Job]) -> None:
        nonlocal running
        for job in todo:
            cell = job.cell
            with sweep.store.claim(cell.name, cell.key) as mine:
                if not mine:
                    continue
                if since is not None and sweep.store.written_since("failed", cell.name, cell.key, since):
                    sweep.failed.append(cell)
                    continue
                try:
                    running = job
                    sweep.done[cell.key] = _finish(job, worker, sweep.store, view, since)
                except StoreError:
                    raise  # the next cell could not be kept either
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    log.debug("cell %s failed:\n%s", cell.name, text)
                    view.failed(cell, summary(error), sweep.store.failed(cell.name, cell.key, text))
                    sweep.failed.append(cell)

    return sweep.work_through(work)


def _finish(job: Job, worker: Worker, store: Store, view: View, since: float | None) -> Record:
    """Return the record of a cell that this process has claimed."""
    cell = job.cell
    journal = open_cell(store, job, view, since)
    if isinstance(journal, Record):
        view.finished(cell, journal)
        return journal
    try:
        view.started(cell, count_requests(job.tasks.load(cell.task), job.config.limit))
        outcome, record = worker.run(job, journal)
        record = store.save(cell.name, record, outcome.texts)
        journal.remove()
    finally:
        journal.close()
    view.finished(cell, record)
    return record
