"""The cells of a run with their tasks, what has come of them, and the view that shows it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from dart_eval.evaluation.local_data import number_asked
from dart_eval.evaluation.sampling import task_draws
from dart_eval.evaluation.settings import check_released
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.models import demo_model
from dart_eval.models.loading import Resolved, choose_device, resolve
from dart_eval.pruning.method import Method
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.results.store import Kind, Store
from dart_eval.sweep.feasible import drop_infeasible
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import Cell, methods_of, plan
from dart_eval.sweep.values import pairs
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json, counted

POLL = 2.0  # seconds between looks at cells that another process is at work on


class View(Protocol):
    """What a person sees of a run."""

    def about(self, text: str) -> None: ...
    def planned(self, cells: int, finished: int) -> None: ...
    def status(self, text: str) -> None: ...
    def started(self, cell: Cell, requests: int) -> None: ...
    def advanced(self, cell: Cell, requests: int, fresh: bool = True) -> None: ...
    def finished(self, cell: Cell, record: Record) -> None: ...
    def failed(self, cell: Cell, error: str, where: Path) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        records: of all finished cells, in the plan's order.
        failed: cells that failed.
        missing: task -> why it could not be loaded (only where that was allowed).
        lost: finished cells with files that have been deleted since, and these files.
    """

    records: list[Record]
    failed: list[Cell]
    missing: dict[str, str]
    lost: list[tuple[Cell, list[Path]]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A cell with its configuration and tasks."""

    cell: Cell
    config: RunConfig
    tasks: Tasks


def plan_all(
    configs: Sequence[RunConfig],
    view: View,
    skip_missing: bool,
    device: str | None = None,
    model: Resolved | None = None,
) -> tuple[dict[str, Job], dict[str, str]]:
    """Return jobs by key, in order, and the tasks that are missing.

    Args:
        device: type of the cells' device, if they run on another machine.
        model: found or loaded earlier; None: find it.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    for config in configs:
        config.check()
        methods_of(config)  # cheap checks first

    def tokenizer() -> object:
        return model and model.load_tokenizer()

    # lm-eval writes shots and settings of generation into a task, and some make as many documents as are asked.
    shelves: dict[tuple[object, ...], Tasks] = {}
    jobs: dict[str, Job] = {}
    missing: dict[str, str] = {}
    refused: list[UserError] = []
    for config in configs:
        view.status("looking up tasks")
        shelf = (config.data_dir, config.num_fewshot, config.limit, config.gen_kwargs)
        if shelf not in shelves:
            shelves[shelf] = Tasks(
                config.data_dir, config.confirm_run_unsafe_code, config.include_path,
                pairs("gen_kwargs", config.gen_kwargs or ""), tokenizer, config.limit,
            )  # fmt: skip
        tasks = shelves[shelf]
        names = tasks.expand(list(config.tasks))
        model = model or _found(config, device, view)
        if config.chat_template and not getattr(model.load_tokenizer(), "chat_template", None):
            raise UserError(f"model {model.identity.name} has no chat template", "leave --chat-template out")
        hashes, found = _hashes(tasks, names, config, view, skip_missing)
        missing |= found
        drawn = {name for name in hashes if _draws(tasks.load(name), config)}
        kind = device or choose_device("auto" if config.device_map else config.device).type
        cells = plan(config, model, list(hashes), hashes, kind, drawn)
        try:
            kept = drop_infeasible(cells, model, Store(config.output), view.status, view.note)
        except UserError as error:
            refused.append(error)
            continue
        for cell in kept:
            jobs.setdefault(cell.key, Job(cell, config, tasks))
    if refused and not jobs:
        raise refused[0]
    for reason in refused:
        view.note(f"left out: {reason}")
    return jobs, missing


def _found(config: RunConfig, device: str | None, view: View) -> Resolved:
    """Find the model. device: see `plan_all`."""
    new = config.model in (None, demo_model.ALIAS) and not demo_model.expanded()
    view.status("expanding the demo model's weights, once: about a minute" if new else "finding the model")
    spec = config
    return resolve(spec if device is None else dataclasses.replace(spec, device="cpu"))


def _hashes(
    tasks: Tasks, names: Sequence[str], config: RunConfig, view: View, skip_missing: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the hashes of tasks, and why others could not be loaded.

    Raises:
        UserError: the first that could not, unless such tasks are skipped.
    """
    hashes, missing = {}, {}
    for name in names:
        view.status(f"loading task {name}")
        try:
            tasks.check_task(name, config.limit, config.num_fewshot)
            hashes[name] = task_hash(tasks.load(name), config)
        except UserError as error:
            if not skip_missing:
                raise
            missing[name] = error.problem
    return hashes, missing


def _draws(items: Sequence[Task | Group], config: RunConfig) -> bool:
    """Return whether a task draws its answers.

    Raises:
        UserError: the configuration asks for answers that the task cannot give.
    """
    found = leaves(list(items))
    for task in found:
        if config.enable_thinking and task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
            raise UserError(
                f"task {task.task_name} scores given answers, but a thinking model thinks before it answers",
                "leave --enable-thinking or the task out",
            )
    for method in methods_of(config):
        check_answers(items, config.scope, method)
    return task_draws(found)


def count_requests(items: Sequence[Task | Group], limit: float | None) -> int:
    """Estimate the number of requests before prompts are built, for a progress bar."""
    total = 0
    for task in leaves(list(items)):
        docs = number_asked(task, limit)
        choices = 1
        if task.OUTPUT_TYPE == "multiple_choice" and docs:
            first = task.eval_docs[0]
            options = task.doc_to_choice(first) if hasattr(task, "doc_to_choice") else [None]
            choices = len(options) if isinstance(options, list) else 1
        total += docs * choices
    return total


def documents(job: Job) -> int:
    """Return the number of documents that a cell asks."""
    return sum(number_asked(task, job.config.limit) for task in leaves(job.tasks.load(job.cell.task)))


@dataclass
class Sweep:
    """Planned cells and their outcomes.

    Attributes:
        jobs: by key, in the plan's order. missing: task -> why it could not be loaded.
        done: records by key. failed: cells.
        since: start of the run that this process is a worker of, in seconds since the epoch. Cells that have been
            finished or have failed since are not tried again.
    """

    jobs: dict[str, Job]
    missing: dict[str, str]
    store: Store
    view: View
    done: dict[str, Record]
    since: float | None = None
    failed: list[Cell] = field(default_factory=list)
    _notes: set[str] = field(default_factory=set)  # on the model, each shown once

    @property
    def todo(self) -> list[Job]:
        """Jobs without a record that have not failed."""
        over = {cell.key for cell in self.failed}
        return [job for key, job in self.jobs.items() if key not in self.done and key not in over]

    @contextlib.contextmanager
    def claim(self, job: Job) -> Iterator[Journal | None]:
        """Yield the journal of a cell that only this process works on; None if another does, or has ended it."""
        with self.store.claim(job.cell.name, job.cell.key) as mine:
            if not mine or self.is_over(job):
                yield None
                return
            with contextlib.closing(self._journal(job)) as journal:
                yield journal

    def is_over(self, job: Job) -> bool:
        """Whether another process has finished a cell, or has failed at it in this run; its claim must be held."""
        cell = job.cell
        if self._changed("failed", cell):
            file = self.store.file("failed", cell.name, cell.key)
            self.failed.append(cell)
            self.view.failed(cell, file.read_text(encoding="utf-8").strip().rpartition("\n")[2], file)
            return True
        anew = job.config.force and not self._changed("cells", cell)
        record = None if anew else self.store.get(cell.name, cell.key)
        if record is not None:
            self._finish(cell, record)
        return record is not None

    def look(self) -> None:
        """Take note of the cells that other processes have ended."""
        for job in self.todo:
            if self._changed("cells", job.cell) or self._changed("failed", job.cell):
                with self.store.claim(job.cell.name, job.cell.key) as free:
                    if free:
                        self.is_over(job)

    def _changed(self, kind: Kind, cell: Cell) -> bool:
        return self.since is not None and self.store.written_since(kind, cell.name, cell.key, self.since)

    def _journal(self, job: Job) -> Journal:
        """Return the journal of a cell, with the answers of an earlier run."""
        cell = job.cell
        if not job.config.force:
            for path in self.store.set_aside(cell.name, cell.key):
                self.view.note(f"{cell.name} was damaged: set aside as {path}, and run again")
        journal = self.store.journal(cell.name, cell.key)
        if job.config.force:
            journal.remove()
        if journal:
            self.view.note(f"{cell.name} goes on after {len(journal)} answers of an earlier run")
        return journal

    def save(self, cell: Cell, record: Record, texts: Sequence[Json], journal: Journal) -> None:
        """Write the record of a claimed cell in place of its journal."""
        record = self.store.save(cell.name, record, texts)
        journal.remove()
        self._finish(cell, record)

    def _finish(self, cell: Cell, record: Record) -> None:
        self.done[cell.key] = record
        self.view.finished(cell, record)
        for text in record.settings.get("notes", []):
            if text not in self._notes:
                self._notes.add(text)
                self.view.note(text)

    def fail(self, cell: Cell, problem: str, text: str) -> None:
        """Write why a claimed cell has failed. text: in full, for example a traceback."""
        self.view.failed(cell, problem, self.store.failed(cell.name, cell.key, text))
        self.failed.append(cell)

    def work_through(self, work: Callable[[list[Job]], None]) -> RunResult:
        """Call `work` until each job has a record or has failed.

        A job that another process has claimed is waited for: that process finishes it, or ends and leaves it to `work`.
        """
        while todo := self.todo:
            work(todo)
            if len(self.todo) == len(todo):
                names = ", ".join(job.cell.name for job in todo)
                self.view.status(f"waiting for another process at work on {names}")
                time.sleep(POLL)
        finished = [(job.cell, self.done[key]) for key, job in self.jobs.items() if key in self.done]
        lost = [(cell, files) for cell, record in finished if (files := self.store.missing(cell.name, record))]
        return RunResult([record for _, record in finished], self.failed, self.missing, lost)


def begin_sweep(
    configs: Sequence[RunConfig],
    view: View,
    skip_missing: bool,
    device: str | None = None,
    model: Resolved | None = None,
    since: float | None = None,
) -> Sweep:
    """Plan (see `plan_all`), and find the cells that are finished already. since: see `Sweep`."""
    configs[0].check_output()
    jobs, missing = plan_all(configs, view, skip_missing, device, model)
    store = Store(configs[0].output)
    done: dict[str, Record] = {}
    if not configs[0].force:
        done = {k: r for k, job in jobs.items() if (r := store.get(job.cell.name, k)) is not None}
    without = sum(jobs[k].config.kl and jobs[k].cell.method.prunes and r.settings.get("kl") is False
                  for k, r in done.items())  # fmt: skip
    if without:
        view.note(f"{counted(without, 'finished cell')} ran without KL: a new --output, or --force, measures it")
    if jobs:
        view.about(_about([*jobs.values()]))
    view.planned(len(jobs), len(done))
    return Sweep(jobs, missing, store, view, done, since)


def _about(jobs: Sequence[Job]) -> str:
    """Return a line about a sweep: model, number format, device, cells, documents, folder."""
    config, inputs = jobs[0].config, jobs[0].cell.inputs

    threads = f", {counted(torch.get_num_threads(), 'thread')}" if inputs["device"] == "cpu" else ""
    return (
        f"{inputs['model']['name']}, {inputs['dtype']}, {inputs['device']}{threads}: {counted(len(jobs), 'cell')}, "
        f"{counted(sum(map(documents, jobs)), 'document')}; results in {config.output}"
    )


class Silent:
    """A view that shows nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def check_answers(items: Sequence[Task | Group], scope: str, method: Method) -> None:
    """Refuse other scopes, and methods that look ahead, for tasks that do not score given answers.

    Raises:
        UserError: a task generates text, the scope is another for a perplexity, or the method does not go with it.
    """
    check_released(method, scope)
    kinds = {"generate_until": "generates text", "loglikelihood_rolling": "measures perplexity"}
    for task in leaves(list(items)):
        kind = kinds.get(task.OUTPUT_TYPE)
        if kind and scope != "scored":
            raise UserError(
                f"task {task.task_name} {kind}: --scope {scope} is for scored answers", "use --scope scored"
            )
        if not method.looks_ahead:
            continue
        if kind == "generates text":
            raise UserError(
                f"method {method.name} looks ahead, and task {task.task_name} generates text",
                f"leave {method.name} or the task out",
            )
        if scope != "scored":
            raise UserError(
                f"method {method.name} needs scored tokens for its mask, and --scope {scope} has none",
                f"leave {method.name} out, or use --scope scored",
            )
