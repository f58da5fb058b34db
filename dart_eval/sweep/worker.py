"""A loaded model that evaluates cells. It knows no folder of results."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import TypeVar

import torch

from dart_eval.evaluation.calibration_text import calibration_text
from dart_eval.evaluation.evaluate import TaskResult, evaluate_task
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models.loading import Resolved
from dart_eval.pruning import cost
from dart_eval.pruning.caches import StatsCache
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.method import Method
from dart_eval.pruning.session import Session, prune
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.sweep.hashes import digest, numeric_files
from dart_eval.sweep.jobs import Job, View
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import Cell, command, environment, versions
from dart_eval.util.bits import Rounding, bits_text, unread
from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.util.machine import hardware, peak_memory
from dart_eval.util.quiet import without_remarks
from dart_eval.util.text import Json
from dart_eval.weights import rounding
from dart_eval.weights.rounding import Rounded

log = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """A loaded model that evaluates cells, and tells a view what it loads and makes, and how far it is."""

    def __init__(self, config: RunConfig, resolved: Resolved, view: View) -> None:
        self._view = view
        view.status(f"loading {resolved.identity.name}")
        self.notes: list[str] = []
        self.model, self.tokenizer = resolved.load(self.notes.append)
        view.status("looking at the model's layers")
        self.halved = 0  # how often memory ran out in the last cell
        self.shape = shape_of(self.model, find_ffns(self.model))
        self._config, self._identity = config, resolved.identity.to_json()
        self._calibrations: dict[Rounding | None, Calibration] = {}  # by the rounding of the weights
        self._rounded: tuple[Rounding, Rounded] | None = None  # the last that a cell asked for
        self.lm = PrunedLM(
            self.model, self.tokenizer, config.batch_size, config.max_length, config.chunk,
            enable_thinking=config.enable_thinking,
            think_end_token=config.think_end_token, add_bos_token=config.add_bos_token, distances=config.kl,
        )  # fmt: skip
        if config.chat_template and config.system_instruction is not None:
            self._check_system(config.system_instruction)

    def _check_system(self, said: str) -> None:
        """Refuse a system message that lm-eval would leave out, as the chat template has no place for one."""
        asked = {"role": "user", "content": "?"}
        with without_remarks():
            alone = self.lm.apply_chat_template([asked])
            whole = self.lm.apply_chat_template([{"role": "system", "content": said}, asked])
        if whole == alone and said.strip() not in whole:
            problem = f"the chat template of {self._identity['name']} takes no system message"
            raise UserError(problem, "leave --system-instruction out")

    def run(self, job: Job, journal: Journal) -> tuple[TaskResult, Record]:
        """Evaluate one cell."""
        cell, settings = job.cell, job.config
        self.lm.on_progress = functools.partial(self._view.advanced, cell)
        start, earlier = time.monotonic(), journal.seconds
        with contextlib.ExitStack() as stack:
            peak = stack.enter_context(peak_memory(self.lm.device.type))
            session = self._attach(stack, cell)
            ffns = find_ffns(self.model)
            share = session.share or rounding.served_share(ffns)
            inputs = rounding.served_share_of_inputs(ffns)
            outcome = self._smaller(lambda: evaluate_task(self.lm, session, job.tasks, cell.task, settings, journal))
            memory = cost.memory(session.method, ffns, session.fast.available, outcome.state_bytes, cell.rounding)
            computed = session.method.computed(outcome.cost.read)
        measured = {
            "seconds": earlier + time.monotonic() - start,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "peak": peak(),
        }
        return outcome, self._record(job, outcome, memory, measured, share, inputs, computed)

    def _attach(self, stack: contextlib.ExitStack, cell: Cell) -> Session:
        self.lm.begin(Session(), {})  # the copies of the last method go before the next ones come
        gc.collect()
        if cell.rounding is not None:
            stack.enter_context(self._round(cell.rounding))
        session: Session = Session()
        if cell.method.prunes:
            self._view.status(_made_for(cell.method))
            if (calibration := self._calibrations.get(cell.rounding)) is None:
                calibration = self._calibrations[cell.rounding] = self._calibrated(cell.rounding)
            pruned = prune(self.model, cell.method, cell.sparsity, calibration=calibration, execution="masked")
            session = stack.enter_context(pruned)
        self._view.status(f"running {cell.title}")
        return session

    def _round(self, wanted: Rounding) -> AbstractContextManager[None]:
        """Return a context of rounded FFN weights; the last stay in memory, since cell after cell asks for them."""
        if self._rounded is None or self._rounded[0] != wanted:
            self._view.status(f"rounding the FFN weights to {bits_text(wanted.text)}")
            self._rounded = None  # before the next: there need not be room for both
            self._rounded = wanted, Rounded(self.model, wanted)
        return self._rounded[1].in_place()

    def _calibrated(self, rounding: Rounding | None) -> Calibration:
        """Return what methods may know of the model, with weights rounded like this, before any prompt."""
        config = self._config
        about = {
            "model": self._identity, "dtype": str(self.model.dtype), "device": self.model.device.type,
            "bits": rounding and rounding.text, "code": digest(numeric_files()), "versions": versions(),
        }  # fmt: skip
        return Calibration(
            self.model, self.tokenizer, lambda: calibration_text(config.calibration, config.data_dir).text,
            config.calibration_size, StatsCache(about),
        )  # fmt: skip

    def _smaller(self, work: Callable[[], T]) -> T:
        """Do the work; if memory runs out, in forwards of half the size, down to one row.

        Earlier answers are in the journal, and the rest is asked again.
        """
        whole, self.halved = self.lm.budget, 0
        try:
            while True:
                try:
                    return work()
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not out_of_memory(error) or not self.lm.budget.can_shrink:
                        raise
                self.lm.budget = self.lm.budget.halved()
                self.halved += 1
                log.warning("out of memory: on with batches of %d", self.lm.budget.rows)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        finally:
            self.lm.budget = whole

    def _scored(self) -> bool:
        """Whether the last cell scored given answers: generated texts have no KL to measure."""
        return bool(self.lm.kinds - {"generate_until"})

    def _record(
        self, job: Job, outcome: TaskResult, memory: int, measured: Json, share: float, inputs: float, computed: float
    ) -> Record:
        """Return the record of a cell.

        Args:
            memory: see `cost.memory`.
            share: FFN weight bytes as they were served / those of the model's own dtype.
            inputs: the same of gate and up alone, which re-masks read.
            computed: share of the FFN weights that a pruned token multiplied.
        """
        cell, config = job.cell, job.config
        used = outcome.cost
        per_token = used.remasks / used.tokens if used.tokens else 0.0
        flops = cost.describe(cell.method, self.shape, used.mean_context, computed, per_token)
        return Record(
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
            memory={"weights": self.shape.weight_bytes, "beside": memory, "state": outcome.state_bytes},
            settings={
                "batch_size": config.batch_size,
                "method": cell.method.spec,
                "command": command(config, cell),
                **({"upper_bound": True} if cell.method.upper_bound else {}),
                **({"granularity": cell.method.granularity} if cell.method.granularity else {}),
                **({"about": True} if rounding.about(find_ffns(self.model)) else {}),
                **({"halved": self.halved} if self.halved else {}),
                **({"kl": False} if not config.kl and self._scored() else {}),
                **({"notes": self.notes} if self.notes else {}),
            },
            environment={**environment(), **hardware({p.device for p in self.model.parameters()})},
            measured=measured,
            cut=sum(p["cut"] for p in outcome.prompts.values()),
            samples=[{**s, "effective_sparsity": unread(s["effective_sparsity"], share)} for s in outcome.samples],
        )


def _made_for(method: Method) -> str:
    """Return the step that takes its time before a method can run."""
    return f"{'calibrating' if method.calibrates else 'preparing'} {method.spec}"
