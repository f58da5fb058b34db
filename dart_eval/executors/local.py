"""Run all cells of a configuration in this process, one after the other.

What can be told of the input beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs, and nothing is written before. What shows only inside a cell fails that cell alone. A stopped run goes on where it
was: finished cells are skipped, and a cell under way goes on after its last finished batch. Several processes may work
on one output folder: each cell is claimed by one of them.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence

from dart_eval.errors import StoreError, summary
from dart_eval.evaluation.evaluate import count_requests
from dart_eval.executors.jobs import Job, RunResult, View, open_cell, plan_all
from dart_eval.executors.worker import Worker
from dart_eval.models import resolve
from dart_eval.plan import Cell, RunConfig
from dart_eval.results.record import Record
from dart_eval.results.store import Store

log = logging.getLogger(__name__)
POLL = 2.0  # seconds between looks at cells that another process is at work on


def run(config: RunConfig, view: View) -> RunResult:
    """Run what is not finished yet; return the records of all cells.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    return run_all([config], view)


def run_all(configs: Sequence[RunConfig], view: View, skip_missing: bool = False) -> RunResult:
    """Run several sweeps of one model into one folder; it is loaded once, and a cell of several sweeps runs once.

    Args:
        configs: they differ in methods, sparsities, tasks, few-shot and limit only.
        skip_missing: go on without tasks whose data cannot be had, and report them.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    common = configs[0]
    jobs, missing = plan_all(configs, view, skip_missing)
    store = Store(common.output)
    done: dict[str, Record] = {}
    if not common.force:
        done = {k: r for k, job in jobs.items() if (r := store.get(job.cell.name, k)) is not None}
    view.planned(len(jobs), len(done))
    failed: list[Cell] = []
    todo = [job for key, job in jobs.items() if key not in done]
    running: Job | None = None
    if todo:
        worker = Worker(
            common,
            resolve(common.model_spec),
            view.status,
            lambda n: view.advanced(running.cell, n) if running else None,
        )
    while todo:
        elsewhere = []  # cells that another process is at work on
        for job in todo:
            cell = job.cell
            with store.claim(cell.name, cell.key) as mine:
                if not mine:
                    elsewhere.append(job)
                    continue
                try:
                    running = job
                    record = _finish(job, worker, store, view)
                except StoreError:
                    raise  # the next cell could not be kept either
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    log.debug("cell %s failed:\n%s", cell.name, text)
                    view.failed(cell, summary(error), store.failed(cell.name, cell.key, text))
                    failed.append(cell)
                    continue
            done[cell.key] = record
        if len(elsewhere) == len(todo):
            names = ", ".join(job.cell.name for job in elsewhere)
            view.status(f"waiting for another process at work on {names}")
            time.sleep(POLL)
        todo = elsewhere
    return RunResult([done[key] for key in jobs if key in done], failed, missing)


def _finish(job: Job, worker: Worker, store: Store, view: View) -> Record:
    """The record of a cell that this process has claimed."""
    cell = job.cell
    journal = open_cell(store, job, view)
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
