"""A run: cells are planned, then claimed, run and saved one after the other, and events tell of it.

Wrong input that can be seen beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs and before anything is written. An error that shows only inside a cell fails that cell alone. A stopped run
continues: finished cells are skipped, and a cell under way resumes after its last finished batch. Several processes may
share an output folder: each cell is claimed by one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from dart_eval.evaluation.local_data import check_documents, number_asked
from dart_eval.evaluation.sampling import task_draws
from dart_eval.evaluation.settings import check_released
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.layers.find import describe
from dart_eval.models import demo_model
from dart_eval.models.loading import Resolved, choose_device, resolve
from dart_eval.results.record import Record
from dart_eval.results.store import Journal, Store
from dart_eval.sweep.events import Event, Tell
from dart_eval.sweep.options import RunConfig, read_settings
from dart_eval.sweep.plan import Cell, methods_of, plan
from dart_eval.util.bits import bits_text
from dart_eval.util.errors import StoreError, UserError, summary
from dart_eval.util.text import Json, counted
from dart_eval.weights.rounding import refuse_fixed

if TYPE_CHECKING:
    from dart_eval.models.loaded import Loaded

log = logging.getLogger(__name__)
POLL = 2.0  # seconds between looks at cells that another process is at work on
GIVES_NO_CHOICE = {"generate_until": "generates text", "loglikelihood_rolling": "measures perplexity"}


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        records: of all finished cells, in the plan's order.
        failed: cells that failed.
        missing: task -> why it could not be loaded (only where that was allowed).
    """

    records: list[Record]
    failed: list[Cell]
    missing: dict[str, str]


# -- which cells -------------------------------------------------------------------------------------------------


def plan_all(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool, device: str | None = None,
    model: Resolved | None = None,
) -> tuple[dict[str, Cell], dict[str, str]]:  # fmt: skip
    """Return cells by key, in order, and the tasks that are missing.

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
    planned: dict[str, Cell] = {}
    missing: dict[str, str] = {}
    refused: list[UserError] = []
    for config in configs:
        tell(Event("wait", "looking up tasks"))
        place = (config.data_dir, config.num_fewshot, config.limit, config.gen_kwargs)
        if place not in shelves:
            shelves[place] = Tasks(
                config.data_dir, config.confirm_run_unsafe_code, config.include_path,
                read_settings(config.gen_kwargs or ""), tokenizer, config.limit,
            )  # fmt: skip
        shelf = shelves[place]
        names = shelf.expand(list(config.tasks))
        if model is None:
            new = config.model in (None, demo_model.ALIAS) and not demo_model.expanded()
            step = "expanding the demo model's weights, once: about a minute" if new else "finding the model"
            tell(Event("wait", step))
            model = resolve(config if device is None else dataclasses.replace(config, device="cpu"))
        if config.chat_template:
            check_template(model, config.system_instruction)
        hashes: dict[str, str] = {}
        for name in names:
            tell(Event("wait", f"loading task {name}"))
            try:
                for task in leaves(shelf.load(name)):
                    check_documents(task, config.limit)
                hashes[name] = task_hash(shelf.load(name), config)
            except UserError as error:
                if not skip_missing:
                    raise
                missing[name] = error.problem
        for name in hashes:
            check_answers(shelf.load(name), config)
        drawn = {name for name in hashes if task_draws(leaves(shelf.load(name)))}
        kind = device or choose_device("auto" if config.device_map else config.device).type
        cells = plan(config, model, list(hashes), hashes, kind, drawn, shelf)
        try:
            for cell in drop_infeasible(cells, model, Store(config.output), tell):
                planned.setdefault(cell.key, cell)
        except UserError as error:
            refused.append(error)
    if refused and not planned:
        raise refused[0]
    for reason in refused:
        tell(Event("note", f"left out: {reason}"))
    return planned, missing


def check_template(model: Resolved, system: str | None) -> None:
    """Refuse a chat template that there is not, and a system message for which it has no place.

    Raises:
        UserError: with the remedy.
    """
    tokenizer, name = model.load_tokenizer(), model.identity.name
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"model {name} has no chat template", "leave --chat-template out")
    if system is None:
        return
    asked = {"role": "user", "content": "?"}
    alone = whole = str(tokenizer.apply_chat_template([asked], tokenize=False))
    with contextlib.suppress(jinja2.TemplateError):
        whole = str(tokenizer.apply_chat_template([{"role": "system", "content": system}, asked], tokenize=False))
    if whole == alone and system.strip() not in whole:
        raise UserError(f"the chat template of {name} takes no system message", "leave --system-instruction out")


def check_answers(items: Sequence[Task | Group], config: RunConfig) -> None:
    """Refuse a scope, thinking, and methods that look ahead, where a task gives no answers for them.

    Raises:
        UserError: with the remedy.
    """
    scope, methods = config.scope, methods_of(config)
    for method in methods:
        check_released(method, scope)
    ahead = [method.name for method in methods if method.looks_ahead]
    for task in leaves(list(items)):
        kind = GIVES_NO_CHOICE.get(task.OUTPUT_TYPE)
        if config.enable_thinking and kind is None:
            problem = f"task {task.task_name} scores given answers, but a thinking model thinks before it answers"
            raise UserError(problem, "leave --enable-thinking or the task out")
        if kind and scope != "scored":
            problem = f"task {task.task_name} {kind}: --scope {scope} is for scored answers"
            raise UserError(problem, "use --scope scored")
        if ahead and kind == "generates text":
            problem = f"method {ahead[0]} looks ahead, and task {task.task_name} generates text"
            raise UserError(problem, f"leave {ahead[0]} or the task out")
    if ahead and scope != "scored":
        problem = f"method {ahead[0]} needs scored tokens for its mask, and --scope {scope} has none"
        raise UserError(problem, f"leave {ahead[0]} out, or use --scope scored")


def drop_infeasible(cells: Sequence[Cell], model: Resolved, store: Store, tell: Tell) -> list[Cell]:
    """Return the cells whose method fits this model and its weights, and whose sparsity it can meet; note the others.

    Only the model's modules count. What shows when it runs (a layer that runs several times for a token, or does more
    than add its FFN's output) fails a cell.

    Raises:
        UserError: there are cells, and none of them can run.
    """
    if all(
        store.file("cells", cell.name, cell.key).is_file() or (cell.method.fits_all and cell.rounding is None)
        for cell in cells
    ):  # what has run before fits
        return list(cells)
    tell(Event("wait", "looking at the model's layers"))
    ffns = describe(model.outline())
    kept: list[Cell] = []
    reasons: dict[str, UserError] = {}
    for cell in cells:
        rounding = cell.rounding
        try:
            if rounding is not None:
                refuse_fixed(ffns)
            if cell.method.prunes:
                cell.method.check(ffns, cell.sparsity, None if rounding is None else rounding.stored(ffns[0].width))
            kept.append(cell)
        except UserError as error:
            on = "" if rounding is None else f" on {bits_text(rounding.text)}"
            reasons[f"{cell.method.spec}{on} at sparsity {cell.sparsity:g}"] = error
    if not kept:
        title, reason = next(iter(reasons.items()))
        raise UserError(f"{title}: {reason.problem}", reason.remedy)
    for title, reason in reasons.items():
        tell(Event("note", f"{title} is left out: {reason}"))
    return kept


def documents(cell: Cell) -> int:
    """Return the number of documents that a cell asks."""
    assert cell.tasks is not None
    return sum(number_asked(task, cell.config.limit) for task in leaves(cell.tasks.load(cell.task)))


def count_requests(items: Sequence[Task | Group], limit: float | None) -> int:
    """Estimate the number of requests before prompts are built, for a progress bar."""
    total = 0
    for task in leaves(list(items)):
        docs, choices = number_asked(task, limit), None
        if task.OUTPUT_TYPE == "multiple_choice" and docs and hasattr(task, "doc_to_choice"):
            choices = task.doc_to_choice(task.eval_docs[0])
        total += docs * (len(choices) if isinstance(choices, list) else 1)
    return total


# -- the run -----------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """Planned cells and their outcomes.

    Attributes:
        cells: by key, in the plan's order. missing: task -> why it could not be loaded.
        done: records by key. failed: cells.
        since: start of the run that this process is a worker of, in seconds since the epoch. Cells that have been
            finished or have failed since are not tried again.
    """

    cells: dict[str, Cell]
    missing: dict[str, str]
    store: Store
    tell: Tell
    done: dict[str, Record]
    since: float | None = None
    failed: list[Cell] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)  # on the model, each shown once

    @property
    def todo(self) -> list[Cell]:
        """Cells without a record that have not failed."""
        over = {cell.key for cell in self.failed} | self.done.keys()
        return [cell for key, cell in self.cells.items() if key not in over]

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[Journal | None]:
        """Yield the journal of a cell that only this process works on; None if another does, or has ended it."""
        with self.store.claim(cell.name, cell.key) as mine:
            if not mine or self.is_over(cell):
                yield None
                return
            anew = cell.config.force
            for path in () if anew else self.store.set_aside(cell.name, cell.key):
                self.tell(Event("note", f"{cell.name} was damaged: set aside as {path}, and run again"))
            journal = self.store.journal(cell.name, cell.key)
            if anew:
                journal.remove()
            if journal:
                text = f"{cell.name} goes on after {len(journal)} answers of an earlier run"
                self.tell(Event("note", text))
            yield journal

    def is_over(self, cell: Cell) -> bool:
        """Whether another process has finished a cell, or has failed at it in this run; its claim must be held."""
        if self._changed("failed", cell):
            file = self.store.file("failed", cell.name, cell.key)
            self.failed.append(cell)
            text = file.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            self.tell(Event("failed", text, cell, where=file))
            return True
        anew = cell.config.force and not self._changed("cells", cell)
        record = None if anew else self.store.get(cell.name, cell.key)
        if record is not None:
            self._finish(cell, record)
        return record is not None

    def look(self) -> None:
        """Take note of the cells that other processes have ended."""
        for cell in self.todo:
            if self._changed("cells", cell) or self._changed("failed", cell):
                with self.store.claim(cell.name, cell.key) as free:
                    if free:
                        self.is_over(cell)

    def _changed(self, kind: str, cell: Cell) -> bool:
        return self.since is not None and self.store.written_since(kind, cell.name, cell.key, self.since)

    def save(self, cell: Cell, record: Record, texts: Sequence[Json], journal: Journal) -> None:
        """Write the record of a claimed cell in place of its journal."""
        record = self.store.save(cell.name, record, texts)
        journal.remove()
        self._finish(cell, record)

    def _finish(self, cell: Cell, record: Record) -> None:
        self.done[cell.key] = record
        self.tell(Event("finished", cell=cell, record=record))
        for text in record.settings.get("notes", []):
            if text not in self.notes:
                self.notes.add(text)
                self.tell(Event("note", text))

    def fail(self, cell: Cell, problem: str, text: str) -> None:
        """Write why a claimed cell has failed. text: in full, for example a traceback."""
        where = self.store.failed(cell.name, cell.key, text)
        self.tell(Event("failed", problem, cell, where=where))
        self.failed.append(cell)

    @contextlib.contextmanager
    def marked(self, cell: Cell) -> Iterator[None]:
        """While the block runs in a worker, mark a cell: if the process is killed, the others leave the cell."""
        if self.since is None:
            yield
            return
        try:
            self.store.failed(cell.name, cell.key, "the process at work on it was killed")
            yield
        finally:  # on a signal, too
            self.store.file("failed", cell.name, cell.key).unlink(missing_ok=True)

    def work_through(self, work: Callable[[list[Cell]], None]) -> RunResult:
        """Call `work` until each cell has a record or has failed.

        A cell that another process has claimed is waited for: that process finishes it, or ends and leaves it to
        `work`.
        """
        while todo := self.todo:
            work(todo)
            if len(self.todo) == len(todo):
                names = ", ".join(cell.name for cell in todo)
                self.tell(Event("wait", f"waiting for another process at work on {names}"))
                time.sleep(POLL)
        return RunResult([self.done[key] for key in self.cells if key in self.done], self.failed, self.missing)


def begin_sweep(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool, device: str | None = None,
    model: Resolved | None = None, since: float | None = None,
) -> Sweep:  # fmt: skip
    """Plan (see `plan_all`), and find the cells that are finished already. since: see `Sweep`."""
    first = configs[0]
    first.check_output()
    cells, missing = plan_all(configs, tell, skip_missing, device, model)
    store = Store(first.output)
    done: dict[str, Record] = {}
    if not first.force:
        done = {k: r for k, cell in cells.items() if (r := store.get(cell.name, k)) is not None}
    without = sum(cells[k].config.kl and cells[k].method.prunes and r.settings.get("kl") is False
                  for k, r in done.items())  # fmt: skip
    if without:
        text = f"{counted(without, 'finished cell')} ran without KL: a new --output, or --force, measures it"
        tell(Event("note", text))
    if cells:
        inputs = next(iter(cells.values())).inputs
        threads = f", {counted(torch.get_num_threads(), 'thread')}" if inputs["device"] == "cpu" else ""
        sizes = f"{counted(len(cells), 'cell')}, {counted(sum(map(documents, cells.values())), 'document')}"
        what = f"{inputs['model']['name']}, {inputs['dtype']}, {inputs['device']}{threads}"
        tell(Event("about", f"{what}: {sizes}; results in {first.output}"))
    tell(Event("planned", n=len(done), of=len(cells)))
    return Sweep(cells, missing, store, tell, done, since)


def run_all(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False, model: Loaded | None = None,
    since: float | None = None,
) -> RunResult:  # fmt: skip
    """Run in this process (see `cluster.run.run_all`); the model is loaded once, a cell of several sweeps runs once.

    Args:
        since: of a worker, see `Sweep`.
    """
    sweep = begin_sweep(configs, tell, skip_missing, model.model.device.type if model else None, model, since)
    return run_rest(sweep, configs[0], model)


def run_rest(sweep: Sweep, config: RunConfig, model: Loaded | None = None) -> RunResult:
    """Run the cells of a sweep that are not finished. config: says how the model is loaded."""
    if sweep.todo:
        from dart_eval.sweep.worker import Worker  # with transformers' models it takes seconds

        worker = Worker(model or resolve(config), sweep.tell)

    def work(todo: list[Cell]) -> None:
        for cell in todo:
            with sweep.claim(cell) as journal:
                if journal is None:
                    continue
                try:
                    assert cell.tasks is not None
                    requests = count_requests(cell.tasks.load(cell.task), cell.config.limit)
                    sweep.tell(Event("started", cell=cell, n=requests))
                    with sweep.marked(cell):
                        outcome, record = worker.run(cell, journal)
                        sweep.save(cell, record, outcome.texts, journal)
                except StoreError:
                    raise  # the next cell could not be kept either
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    log.debug("cell %s failed:\n%s", cell.name, text)
                    sweep.fail(cell, summary(error), text)

    return sweep.work_through(work)
