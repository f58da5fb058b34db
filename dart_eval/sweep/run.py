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
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jinja2
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from dart_eval.evaluation.documents import check_documents
from dart_eval.evaluation.settings import check_released
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks, leaves, task_draws
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe, find_ffns
from dart_eval.models import demo_model
from dart_eval.models.loading import Resolved, choose_device, resolve
from dart_eval.results.metrics import asked
from dart_eval.results.record import Record
from dart_eval.results.store import Journal, Store
from dart_eval.sweep.events import Event, Tell
from dart_eval.sweep.options import RunConfig, read_settings
from dart_eval.sweep.plan import Cell, methods_of, plan
from dart_eval.util.errors import Misfit, StoreError, UserError, summary
from dart_eval.util.text import Json, bits_text, counted
from dart_eval.weights.rounding import refuse_fixed

log = logging.getLogger(__name__)
POLL = 2.0  # seconds between looks at cells that another process is at work on
GIVES_NO_CHOICE = {"generate_until": "generates text", "loglikelihood_rolling": "measures perplexity"}


# -- which cells -------------------------------------------------------------------------------------------------


def begin_sweep(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False, device: str | None = None,
    model: Resolved | None = None, since: float = math.inf,
) -> Sweep:  # fmt: skip
    """Plan the cells of all configurations, and find those that are finished already.

    Args:
        skip_missing: leave out tasks whose data cannot be had.
        device: type of the cells' device, if they run on another machine.
        model: found or loaded earlier; None: find it.
        since: see `Sweep`.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    for config in configs:
        config.check()
        methods_of(config)  # cheap checks first
    first = configs[0]
    if model is None:
        new = first.model in (None, demo_model.ALIAS) and not demo_model.expanded()
        step = "expanding the demo model's weights, once: about a minute" if new else "finding the model"
        tell(Event("wait", step))
        model = resolve(first if device is None else dataclasses.replace(first, device="cpu"))
    for system in {config.system_instruction for config in configs if config.chat_template}:
        check_template(model, system)
    sweep = Sweep(model, Store(first.output), tell, since)
    # lm-eval writes shots and settings of generation into a task, and some make as many documents as are asked.
    shelves: dict[tuple[object, ...], Tasks] = {}
    misfits: dict[str, Misfit] = {}  # by key
    for config in configs:
        place = (config.data_dir, config.num_fewshot, config.limit, config.gen_kwargs)
        if place not in shelves:
            tell(Event("wait", "looking up tasks"))
            shelves[place] = Tasks(
                config.data_dir, config.confirm_run_unsafe_code, config.include_path,
                read_settings(config.gen_kwargs or ""), model.load_tokenizer, config.limit,
            )  # fmt: skip
        shelf, hashes = shelves[place], dict[str, str]()
        for name in shelf.expand(list(config.tasks)):
            tell(Event("wait", f"loading task {name}"))
            try:
                for task in leaves(shelf.load(name)):
                    check_documents(task, config.limit)
                hashes[name] = task_hash(shelf.load(name), config)
            except UserError as error:
                if not skip_missing:
                    raise
                sweep.missing[name] = error.problem
                tell(Event("note", f"left out: {error.problem}"))
                continue
            check_answers(shelf.load(name), config)
        drawn = {name for name in hashes if task_draws(leaves(shelf.load(name)))}
        kind = device or choose_device("auto" if config.device_map else config.device).type
        cells = plan(config, model, hashes, kind, drawn, shelf)
        misfits |= misfits_of(cells, sweep)
        for cell in cells:
            if cell.key not in misfits:
                sweep.cells.setdefault(cell.key, cell)
    if misfits and not sweep.cells:
        raise next(iter(misfits.values()))
    for misfit in misfits.values():
        sweep.note(f"left out: {misfit}")
    if not first.force:
        sweep.done = {key: record for key, cell in sweep.cells.items() if (record := sweep.store.get(cell.name, key))}
    if sweep.cells:
        inputs = next(iter(sweep.cells.values())).inputs
        what = f"{inputs['model']['name']}, {inputs['dtype']}, {inputs['device']}"
        levels = sorted({cell.sparsity for cell in sweep.cells.values() if cell.method.sized})
        asks = f"; --sparsity {','.join(f'{s:g}' for s in levels)} asks for a read of {', '.join(map(asked, levels))}"
        what += f": {counted(len(sweep.cells), 'cell')}{asks * bool(levels)}"
        tell(Event("about", f"{what}; results in {first.output}"))
    tell(Event("planned", n=len(sweep.done), of=len(sweep.cells)))
    return sweep


def misfits_of(cells: Sequence[Cell], sweep: Sweep) -> dict[str, Misfit]:
    """Return the cells that `refuse_misfit` refuses by the model's modules alone, by key."""
    new = [cell for cell in cells if not sweep.store.file("cells", cell.name, cell.key).is_file()]  # others have fitted
    unsure = [cell for cell in new if cell.rounding is not None or not cell.method.fits_all]
    if not unsure:
        return {}
    sweep.tell(Event("wait", "looking at the model's layers"))
    ffns, misfits = describe(sweep.model.outline()), dict[str, Misfit]()
    for cell in unsure:
        try:
            refuse_misfit(cell, ffns)
        except Misfit as error:
            misfits[cell.key] = error
    return misfits


def refuse_misfit(cell: Cell, ffns: Sequence[FFN]) -> None:
    """Refuse a cell whose method does not fit the model and its weights, or whose sparsity it cannot meet.

    Args:
        ffns: of the model: described, or tried too, which shows more: layers that run several times for a token, or do
            more than add their FFN's output.

    Raises:
        Misfit: with the reason.
    """
    rounding, method = cell.rounding, cell.method
    try:
        if rounding is not None:
            refuse_fixed(ffns, rounding)
        if method.prunes:
            method.check(ffns, cell.sparsity, None if rounding is None else rounding.stored(ffns[0].width))
    except UserError as error:
        on = "" if rounding is None else f" on {bits_text(rounding.text)}"
        raise Misfit(f"{method.spec}{on} at sparsity {cell.sparsity:g}: {error.problem}", error.remedy) from None


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
    """Refuse a scope, thinking, and methods that look ahead or write texts, where a task gives no answers for them.

    Raises:
        UserError: with the remedy.
    """
    scope, methods = config.scope, methods_of(config)
    for method in methods:
        check_released(method, scope)
    ahead = next((method.name for method in methods if method.looks_ahead), None)
    if ahead and scope != "scored":
        problem = f"method {ahead} needs scored tokens for its mask, and --scope {scope} has none"
        raise UserError(problem, f"leave {ahead} out, or use --scope scored")
    writer = next((method.name for method in methods if method.inner is not method), None)
    for task in leaves(list(items)):
        name, kind = f"task {task.task_name}", GIVES_NO_CHOICE.get(task.OUTPUT_TYPE)
        if config.enable_thinking and kind is None:
            problem = f"{name} scores given answers, but a thinking model thinks before it answers"
            raise UserError(problem, "leave --enable-thinking or the task out")
        if kind and scope != "scored":
            raise UserError(f"{name} {kind}: --scope {scope} is for scored answers", "use --scope scored")
        if ahead and kind == "generates text":
            raise UserError(f"method {ahead} looks ahead, and {name} generates text", f"leave {ahead} or the task out")
        if writer and kind != "generates text":
            remedy = f"leave {writer} or the task out"
            raise UserError(f"method {writer} writes texts, and {name} {kind or 'scores given answers'}", remedy)


# -- the run -----------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """Planned cells and their outcomes.

    Attributes:
        model: of all cells.
        since: start of the run that this process is a worker of, in seconds since the epoch; infinite in others. Cells
            that have been finished or have failed since are not tried again.
        cells: by key, in the plan's order. missing: task -> why it could not be loaded.
        done: records by key. failed: cells.
        notes: what was told once, on the model and on cells that were left out.
    """

    model: Resolved
    store: Store
    tell: Tell
    since: float = math.inf
    cells: dict[str, Cell] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    done: dict[str, Record] = field(default_factory=dict)
    failed: list[Cell] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    @property
    def records(self) -> list[Record]:
        """Those of finished cells, in the plan's order."""
        return [self.done[key] for key in self.cells if key in self.done]

    @property
    def todo(self) -> list[Cell]:
        """Cells without a record that have not failed."""
        over = {cell.key for cell in self.failed} | self.done.keys()
        return [cell for key, cell in self.cells.items() if key not in over]

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[Journal | None]:
        """Yield the journal of a cell that only this process works on; None if another does, or has ended it."""
        with self.store.claim(cell.name, cell.key) as mine:
            if not mine or self.has_ended(cell):
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

    def has_ended(self, cell: Cell) -> bool:
        """Take note of a cell that another process has finished, or has failed at in this run; its claim is held."""
        if self.store.written_since("failed", cell.name, cell.key, self.since):
            file = self.store.file("failed", cell.name, cell.key)
            self.failed.append(cell)
            text = file.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            self.tell(Event("failed", text, cell, where=file))
            return True
        anew = cell.config.force and not self.store.written_since("cells", cell.name, cell.key, self.since)
        if not anew and (record := self.store.get(cell.name, cell.key)) is not None:
            self._finish(cell, record)
        return cell.key in self.done

    def look(self) -> None:
        """Take note of the cells that workers have ended."""
        for cell in self.todo:
            if any(self.store.written_since(kind, cell.name, cell.key, self.since) for kind in ("cells", "failed")):
                with self.store.claim(cell.name, cell.key) as free:
                    if free:
                        self.has_ended(cell)

    def save(self, cell: Cell, record: Record, texts: Sequence[Json], journal: Journal) -> None:
        """Write the record of a claimed cell in place of its journal."""
        record = self.store.save(cell.name, record, texts)
        journal.remove()
        self._finish(cell, record)

    def _finish(self, cell: Cell, record: Record) -> None:
        self.done[cell.key] = record
        self.tell(Event("finished", cell=cell, record=record))
        for text in record.settings.get("notes", []):
            self.note(text)

    def note(self, text: str) -> None:
        """Tell what was not told before."""
        if text not in self.notes:
            self.notes.add(text)
            self.tell(Event("note", text))

    def leave_out(self, cell: Cell, misfit: Misfit) -> None:
        """Do without a cell whose method does not fit the model, which was seen as the model ran.

        Raises:
            Misfit: there is no other cell.
        """
        del self.cells[cell.key]
        if not self.cells:
            raise misfit
        self.note(f"left out: {misfit}")

    def fail(self, cell: Cell, problem: str, text: str) -> None:
        """Write why a claimed cell has failed. text: in full, for example a traceback."""
        where = self.store.failed(cell.name, cell.key, text)
        self.tell(Event("failed", problem, cell, where=where))
        self.failed.append(cell)

    @contextlib.contextmanager
    def marked(self, cell: Cell) -> Iterator[None]:
        """Mark a cell while a worker runs the block: if the process is killed, the others leave the cell alone."""
        if self.since < math.inf:
            self.store.failed(cell.name, cell.key, "the process at work on it was killed")
        try:
            yield
        finally:  # on a signal, too
            self.store.file("failed", cell.name, cell.key).unlink(missing_ok=True)

    def work_through(self, work: Callable[[list[Cell]], None]) -> Sweep:
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
        return self

    def run_here(self) -> Sweep:
        """Run the cells that are not finished in this process, one after the other."""
        if self.todo:
            from dart_eval.sweep.worker import Worker  # with transformers' models it takes seconds

            worker = Worker(self.model, self.tell, self.store.folder)

        def work(todo: list[Cell]) -> None:
            for cell in todo:
                with self.claim(cell) as journal:
                    if journal is None:
                        continue
                    try:
                        self.tell(Event("started", cell=cell))
                        with self.marked(cell):
                            refuse_misfit(cell, find_ffns(worker.model))
                            outcome, record = worker.run(cell, journal)
                            self.save(cell, record, outcome.texts, journal)
                    except Misfit as misfit:
                        self.leave_out(cell, misfit)
                    except StoreError:
                        raise  # the next cell could not be kept either
                    except Exception as error:
                        text = "".join(traceback.format_exception(error))
                        log.debug("cell %s failed:\n%s", cell.name, text)
                        self.fail(cell, summary(error), text)

        return self.work_through(work)
