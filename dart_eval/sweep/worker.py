"""A loaded model that evaluates cells. Of the folder of results it knows dense's states alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dart_eval.evaluation.calibration_text import calibration_text
from dart_eval.evaluation.evaluate import TaskResult, evaluate_task, gather, scores
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.states import States
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models.loading import Resolved
from dart_eval.pruning import cost
from dart_eval.pruning.caches import StatsCache
from dart_eval.pruning.calibration import DEFAULT_TEXT, ROUNDING_TEXT, Calibration
from dart_eval.pruning.session import Session, prune
from dart_eval.results.record import Record
from dart_eval.results.store import Journal
from dart_eval.sweep.events import Event, Tell
from dart_eval.sweep.hashes import digest, numeric_files
from dart_eval.sweep.plan import Cell, command, environment, versions
from dart_eval.util.bits import Rounding, unread
from dart_eval.util.errors import out_of_memory
from dart_eval.util.machine import hardware, peak_memory
from dart_eval.util.text import bits_text
from dart_eval.weights import rounding
from dart_eval.weights.rounding import Rounded

log = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """A loaded model that evaluates cells, and tells what it loads and makes, and how far it is.

    Args:
        folder: of results, where dense's states are kept; None: they are kept in memory.
    """

    def __init__(self, resolved: Resolved, tell: Tell, folder: Path | None = None) -> None:
        self._tell, self._folder = tell, folder
        tell(Event("wait", f"loading {resolved.identity.name}"))
        self.notes: list[str] = []
        self.model, self.tokenizer = resolved.load(self.notes.append)
        tell(Event("wait", "looking at the model's layers"))
        self.shape = shape_of(self.model, find_ffns(self.model))
        self.resolved = resolved
        self._calibrations: dict[tuple[Rounding | None, Path], Calibration] = {}
        self._rounded: tuple[Rounding, Rounded] | None = None  # the last that a cell asked for
        self._states: tuple[str, States] | None = None  # the same of dense's states, by its cell's key

    def run(self, cell: Cell, journal: Journal) -> tuple[TaskResult, Record]:
        """Evaluate one cell."""
        config, method, tasks = cell.config, cell.method, cell.tasks
        assert tasks is not None
        gc.collect()  # the copies of the last method go before the next ones come
        states = self._states_for(cell) if config.kl and scores(tasks.load(cell.task)) else None
        lm = self._lm(cell, states)
        start, earlier, whole = time.monotonic(), journal.seconds, not journal
        with contextlib.ExitStack() as stack:
            peak = stack.enter_context(peak_memory(lm.device.type))
            if cell.rounding is not None:
                stack.enter_context(self._round(cell))
            session: Session = Session()
            if method.prunes:
                self._tell(Event("wait", f"{'calibrating' if method.calibrates else 'preparing'} {method.spec}"))
                known = self._calibration(cell, cell.rounding)
                pruned = prune(self.model, method, cell.sparsity, calibration=known, execution="masked")
                session = stack.enter_context(pruned)
            self._tell(Event("wait", f"running {cell.title}"))
            ffns = find_ffns(self.model)
            share, inputs = session.share or rounding.served_share(ffns), rounding.served_share_of_inputs(ffns)
            outcome, halved = _smaller(lm, lambda: evaluate_task(lm, session, tasks, cell.task, config, journal))
            memory = cost.memory(session.method, ffns, session.fast.available, journal.state_bytes, cell.rounding)
            pruner = session.writer or session.method
            computed = pruner.computed(outcome.cost.read)
            fetched = pruner.fetched(outcome.cost.read) if outcome.cost.read < 1 else 1.0  # then from end to end
        if states and states.gathering and whole:  # else some of its states are lost
            self._put(cell, states.tensors())
        measured = {
            "seconds": earlier + time.monotonic() - start,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "peak": peak(),
        }
        used, no_room = outcome.cost, list[str]()
        if states and states.full and cell.dense:
            no_room = [f"no KL on {cell.task}: dense's states take more than {config.kl_room:g} GB (--kl-room)"]
        flops = cost.describe(method, self.shape, used.mean_context, computed, used.remasks / max(used.tokens, 1))
        notable = {
            "upper_bound": method.upper_bound, "granularity": method.granularity, "about": rounding.about(ffns),
            "halved": halved, "notes": [*self.notes, *no_room],
            "calibration": cell.text if cell.inputs["calibration"] else None,
        }  # fmt: skip
        record = Record(
            key=cell.key,
            inputs=cell.inputs,
            metrics=outcome.metrics,
            mask_sparsity=used.mask_sparsity,
            effective_sparsity=unread(used.effective_sparsity, share),
            weights_read=used.read * share,
            tokens=used.tokens,
            remasks=used.remasks,
            by_task={
                task: {
                    "tokens": own.tokens,
                    "remasks": own.remasks,
                    "mask_sparsity": own.mask_sparsity,
                    "effective_sparsity": unread(own.effective_sparsity, share),
                    **outcome.prompts[task],
                }
                for task, own in outcome.by_task.items()
            },
            flops={**flops, "remask_bytes": flops["remask_reads"] * inputs},
            memory={"weights": self.shape.weight_bytes, "beside": memory, "state": journal.state_bytes},
            settings={
                "batch_size": config.batch_size,
                "method": method.spec,
                "command": command(config, cell),
                # generated texts have no KL to measure
                **({"kl": False} if no_room or (not config.kl and lm.kinds - {"generate_until"}) else {}),
                **{name: value for name, value in notable.items() if value},
            },
            environment={**environment(), **hardware({p.device for p in self.model.parameters()})},
            measured=measured,
            cut=sum(p["cut"] for p in outcome.prompts.values()),
            fetched=None if fetched is None else fetched * share,
            samples=[{**s, "effective_sparsity": unread(s["effective_sparsity"], share)} for s in outcome.samples],
        )
        return outcome, record

    def _lm(self, cell: Cell, states: States | None) -> PrunedLM:
        """Return the model as lm-eval sees it, which tells how far it is with the cell."""
        config = cell.config
        lm = PrunedLM(
            self.model, self.tokenizer, config.batch_size, config.max_length, config.chunk, config.enable_thinking,
            config.think_end_token, states, config.add_bos_token,
        )  # fmt: skip
        lm.on_progress = lambda n, of: self._tell(Event("answered", cell=cell, n=n, of=of))
        return lm

    def _states_for(self, cell: Cell) -> States:
        """Return the states that dense had on the cell's task, made now if need be; for dense itself, none yet."""
        room, dense, tasks = round(cell.config.kl_room * 1e9), cell.dense, cell.tasks
        if dense is None or tasks is None:
            return States(room)
        if self._states is None or self._states[0] != dense.key:
            self._states = None  # before the next: there need not be room for both
            tensors = self._file(dense).get({}) if self._folder else None
            if tensors is None:
                self._tell(Event("wait", f"running dense on {cell.task}, to compare with"))
                gathered = States(room)
                lm = self._lm(cell, gathered)
                _smaller(lm, lambda: gather(lm, tasks, cell.task, cell.config))
                tensors = gathered.tensors()
                self._put(dense, tensors)
            self._states = dense.key, States(room, tensors)
        return self._states[1]

    def _put(self, dense: Cell, states: list[Tensor]) -> None:
        """Keep the states of a dense cell for the rows to come, in other processes too."""
        if self._folder:
            self._file(dense).put({}, states)

    def _file(self, dense: Cell) -> StatsCache:
        """Return the file of a dense cell's states."""
        return StatsCache({"key": dense.key, "room": dense.config.kl_room}, "states", self._folder)

    def _round(self, cell: Cell) -> AbstractContextManager[None]:
        """Return a context of rounded FFN weights; the last stay in memory, since cell after cell asks for them."""
        wanted = cell.rounding
        assert wanted is not None
        if self._rounded is None or self._rounded[0] != wanted:
            self._tell(Event("wait", f"rounding the FFN weights to {bits_text(wanted.text)}"))
            self._rounded = None  # before the next: there need not be room for both
            self._rounded = wanted, Rounded(self.model, wanted, self._calibration(cell, None, ROUNDING_TEXT))
        return self._rounded[1].in_place()

    def _calibration(self, cell: Cell, bits: Rounding | None, shipped: Path = DEFAULT_TEXT) -> Calibration:
        """Return what may be known of a model, rounded to `bits`, before any prompt: of its text, or `shipped`."""
        config = cell.config
        if (bits, shipped) not in self._calibrations:
            about = {
                "model": self.resolved.identity.to_json(), "dtype": str(self.model.dtype),
                "device": self.model.device.type, "bits": bits and bits.text,
                "code": digest(numeric_files()), "versions": versions(),
            }  # fmt: skip
            name = config.calibration or str(shipped)
            self._calibrations[bits, shipped] = Calibration(
                self.model, self.tokenizer, lambda: calibration_text(name, config.data_dir).text,
                config.calibration_size, StatsCache(about),
            )  # fmt: skip
        return self._calibrations[bits, shipped]


def _smaller(lm: PrunedLM, work: Callable[[], T]) -> tuple[T, int]:
    """Do the work; if memory runs out, in forwards of half the size, down to one row.

    Earlier answers are in the journal, and the rest is asked again.

    Returns:
        What came of it, and how often the size was halved.
    """
    halved = 0
    while True:
        try:
            return work(), halved
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or not lm.budget.can_shrink:
                raise
        lm.budget = lm.budget.halved()
        halved += 1
        log.warning("out of memory: on with batches of %d", lm.budget.rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
