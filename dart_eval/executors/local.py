"""Run all cells of a configuration in this process, one after the other.

What can be told of the input beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs, and nothing is written before. What shows only inside a cell fails that cell alone. A stopped run goes on where it
was: finished cells are skipped, and a cell under way goes on after its last finished batch. Several processes may work
on one output folder: each cell is claimed by one of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

from dart_eval import cost
from dart_eval.errors import StoreError, UserError
from dart_eval.evaluation.evaluate import Outcome, check_answers, count_requests, evaluate_task, task_hash
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.tasks import Tasks
from dart_eval.ffn import find_ffns
from dart_eval.machine import peak_memory
from dart_eval.models import Resolved, pick_device, resolve
from dart_eval.plan import Cell, RunConfig, command, environment, methods_of, plan, spec_of
from dart_eval.pruning.calibration import TextCalibration
from dart_eval.pruning.session import prune
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.results.store import Store

log = logging.getLogger(__name__)
POLL = 2.0  # seconds between looks at cells that another process is at work on


class View(Protocol):
    """What a person sees of a run."""

    def planned(self, cells: int, finished: int) -> None: ...
    def status(self, text: str) -> None: ...
    def started(self, cell: Cell, requests: int) -> None: ...
    def advanced(self, requests: int) -> None: ...
    def finished(self, cell: Cell, record: Record) -> None: ...
    def failed(self, cell: Cell, error: BaseException) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        records: of all finished cells, in the plan's order.
        failed: cells that failed.
        missing: task -> why it could not be loaded (only where that was allowed).
    """

    records: list[Record]
    failed: list[Cell]
    missing: dict[str, str]


@dataclass(frozen=True)
class _Job:
    """A cell with what it takes to run it."""

    cell: Cell
    config: RunConfig
    tasks: Tasks


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
    for config in configs:
        config.check()
        methods_of(config)  # cheap checks first
    jobs, missing = _plan_all(configs, view, skip_missing)
    store = Store(common.output)
    done: dict[str, Record] = {}
    if not common.force:
        done = {k: r for k, job in jobs.items() if (r := store.get(job.cell.name, k)) is not None}
    view.planned(len(jobs), len(done))
    failed: list[Cell] = []
    todo = [job for key, job in jobs.items() if key not in done]
    if todo:
        runner = _Runner(common, resolve(common.model_spec), store, view)
    while todo:
        elsewhere = []  # cells that another process is at work on
        for job in todo:
            cell = job.cell
            with store.claim(cell.name, cell.key) as mine:
                if not mine:
                    elsewhere.append(job)
                    continue
                try:
                    record = runner.finish(job)
                except StoreError:
                    raise  # the next cell could not be kept either
                except Exception as error:
                    log.debug("cell %s failed:\n%s", cell.name, "".join(traceback.format_exception(error)))
                    view.failed(cell, error)
                    failed.append(cell)
                    continue
            done[cell.key] = record
        if len(elsewhere) == len(todo):
            names = ", ".join(job.cell.name for job in elsewhere)
            view.status(f"waiting for another process at work on {names}")
            time.sleep(POLL)
        todo = elsewhere
    return RunResult([done[key] for key in jobs if key in done], failed, missing)


def _plan_all(configs: Sequence[RunConfig], view: View, skip_missing: bool) -> tuple[dict[str, _Job], dict[str, str]]:
    """Jobs by key, in order, and the tasks that are missing."""
    shelves: dict[Any, Tasks] = {}  # lm-eval writes the number of shots into a task, so it is loaded once for each
    jobs: dict[str, _Job] = {}
    missing: dict[str, str] = {}
    model: Resolved | None = None
    for config in configs:
        view.status("looking up tasks")
        shelf = (config.data_dir, config.cue, config.num_fewshot)
        if shelf not in shelves:
            shelves[shelf] = Tasks(config.data_dir, config.cue)
        tasks = shelves[shelf]
        names = tasks.expand(list(config.tasks))
        if model is None:
            view.status("finding the model")
            model = resolve(config.model_spec)
        hashes = {}
        for name in names:
            view.status(f"loading task {name}")
            try:
                hashes[name] = task_hash(tasks.load(name), config.eval_settings)
            except UserError as error:
                if not skip_missing:
                    raise
                missing[name] = error.problem
                continue
            for method in methods_of(config):
                check_answers(tasks.load(name), config.scope, method)
        device = pick_device("auto" if config.device_map else config.device).type
        for cell in plan(config, model, list(hashes), hashes, device):
            jobs.setdefault(cell.key, _Job(cell, config, tasks))
    if not jobs:
        raise UserError(f"none of the tasks could be loaded: {'; '.join(missing.values())[:300]}", "see --data-dir")
    return jobs, missing


class _Runner:
    """A loaded model and the store; runs cells."""

    def __init__(self, config: RunConfig, resolved: Resolved, store: Store, view: View) -> None:
        self.store, self.view = store, view
        view.status(f"loading {resolved.identity.name}")
        self.model, self.tokenizer = resolved.load()
        if config.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(f"model {resolved.identity.name} has no chat template", "leave --chat-template out")
        self.shape = cost.shape_of(self.model, find_ffns(self.model))
        self.calibration = TextCalibration(self.model, self.tokenizer, config.calibration)
        self.lm = PrunedLM(
            self.model,
            self.tokenizer,
            config.batch_size,
            config.max_length,
            config.chunk,
            on_progress=view.advanced,
            share_prefix=config.share_prefix,
        )

    def finish(self, job: _Job) -> Record:
        """The record of a cell that this process has claimed: what another process has made meanwhile, or a new one."""
        cell, force = job.cell, job.config.force
        if not force and (made := self.store.get(cell.name, cell.key)) is not None:
            self.view.finished(cell, made)
            return made
        if not force:
            for path in self.store.set_aside(cell.name, cell.key):
                self.view.note(f"{cell.name} was damaged: set aside as {path}, and run again")
        journal = self.store.journal(cell.name, cell.key)
        if force:
            journal.remove()
        if journal:
            self.view.note(f"{cell.name} goes on after {len(journal)} answers of an earlier run")
        try:
            outcome, record = self.run(job, journal)
            record = self.store.save(cell.name, record, outcome.texts)
            journal.remove()
        finally:
            journal.close()
        self.view.finished(cell, record)
        return record

    def run(self, job: _Job, journal: Journal) -> tuple[Outcome, Record]:
        """Evaluate one cell."""
        cell, settings = job.cell, job.config.eval_settings
        self.view.started(cell, count_requests(job.tasks.load(cell.task), settings.limit))
        start, earlier = time.monotonic(), journal.seconds
        with contextlib.ExitStack() as stack:
            peak = stack.enter_context(peak_memory(self.lm.device.type))
            session = None
            if cell.method.prunes:
                session = stack.enter_context(
                    prune(self.model, cell.method, cell.sparsity, calibration=self.calibration, execution="masked")
                )
            outcome = evaluate_task(self.lm, session, job.tasks, cell.task, settings, journal)
            state = max(outcome.state_bytes, session.state_bytes if session and session.state is None else 0)
        measured = {
            "seconds": earlier + time.monotonic() - start,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "peak": peak(),
        }
        return outcome, self._record(job, outcome, state, measured)

    def _record(self, job: _Job, outcome: Outcome, state: int, measured: dict[str, Any]) -> Record:
        cell, config = job.cell, job.config
        usage = outcome.usage
        weights_read = usage.weights_read
        per_token = usage.remasks / usage.tokens if usage.tokens else 0.0
        return Record(
            key=cell.key,
            inputs=cell.inputs,
            metrics=outcome.metrics,
            mask_sparsity=usage.mask_sparsity,
            effective_sparsity=usage.effective_sparsity,
            weights_read=weights_read,
            tokens=usage.tokens,
            remasks=usage.remasks,
            by_task={
                task: {
                    "tokens": used.tokens,
                    "remasks": used.remasks,
                    "mask_sparsity": used.mask_sparsity,
                    "effective_sparsity": used.effective_sparsity,
                }
                for task, used in outcome.by_task.items()
            },
            flops=cost.describe(cell.method, self.shape, usage.mean_context, weights_read, per_token),
            memory={"weights": self.shape.weight_bytes, "state": state},
            settings={
                "batch_size": config.batch_size,
                "share_prefix": config.share_prefix,
                "method": spec_of(cell.method),
                "command": command(config, cell),
            },
            environment=environment(),
            measured=measured,
            samples=outcome.samples,
        )


class Silent:
    """A view that shows nothing."""

    def __getattr__(self, _name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None
