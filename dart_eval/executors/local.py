"""Run all cells of a configuration in this process, one after the other.

What can be told of the input beforehand (names, data, folders, parameters, the model) is refused before the first cell
runs, and nothing is written before the first cell is finished. What shows only inside a cell fails that cell alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

from dart_eval import cost
from dart_eval.errors import UserError
from dart_eval.evaluation.evaluate import Outcome, count_requests, evaluate_task, task_hash
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.tasks import Tasks
from dart_eval.ffn import find_ffns
from dart_eval.models import Resolved, pick_device, resolve
from dart_eval.plan import Cell, RunConfig, environment, methods_of, plan
from dart_eval.pruning.calibration import TextCalibration
from dart_eval.pruning.session import prune
from dart_eval.results.record import Record
from dart_eval.results.store import Store, StoreError

log = logging.getLogger(__name__)


class View(Protocol):
    """What a person sees of a run."""

    def planned(self, cells: int, finished: int) -> None: ...
    def status(self, text: str) -> None: ...
    def started(self, cell: Cell, requests: int) -> None: ...
    def advanced(self, requests: int) -> None: ...
    def finished(self, cell: Cell, record: Record) -> None: ...
    def failed(self, cell: Cell, error: BaseException) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """Records of the configuration's cells, in the plan's order, and the cells that failed."""

    records: list[Record]
    failed: list[Cell]


def run(config: RunConfig, view: View) -> RunResult:
    """Run what is not finished yet; return the records of all cells.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    config.check()
    methods_of(config)  # cheap checks first
    view.status("looking up tasks")
    tasks = Tasks(config.data_dir, config.cue)
    names = tasks.expand(list(config.tasks))
    view.status("finding the model")
    model = resolve(config.model_spec)
    hashes = {}
    for name in names:
        view.status(f"loading task {name}")
        hashes[name] = task_hash(tasks.load(name), config.eval_settings)
    device = pick_device("auto" if config.device_map else config.device).type
    cells = plan(config, model, names, hashes, device)
    store = Store(config.output)
    done = {} if config.force else {c.key: r for c in cells if (r := store.get(c.name, c.key)) is not None}
    view.planned(len(cells), len(done))
    failed: list[Cell] = []
    todo = [c for c in cells if c.key not in done]
    if todo:
        runner = _Runner(config, model, tasks, view)
        for cell in todo:
            try:
                record = runner.run(cell)
                store.save(cell.name, record)
            except StoreError:
                raise  # the next cell could not be kept either
            except Exception as error:
                log.debug("cell %s failed:\n%s", cell.name, "".join(traceback.format_exception(error)))
                view.failed(cell, error)
                failed.append(cell)
                continue
            done[cell.key] = record
            view.finished(cell, record)
    return RunResult([done[c.key] for c in cells if c.key in done], failed)


class _Runner:
    """A loaded model with its tasks; runs cells."""

    def __init__(self, config: RunConfig, resolved: Resolved, tasks: Tasks, view: View) -> None:
        self.config, self.tasks, self.view = config, tasks, view
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
        )

    def run(self, cell: Cell) -> Record:
        """Evaluate one cell."""
        self.view.started(cell, count_requests(self.tasks.load(cell.task), self.config.limit))
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            peak = stack.enter_context(_peak_memory(self.lm.device.type))
            session = None
            if cell.method.prunes:
                session = stack.enter_context(
                    prune(self.model, cell.method, cell.sparsity, calibration=self.calibration)
                )
            outcome = evaluate_task(self.lm, session, self.tasks, cell.task, self.config.eval_settings)
            state = max(outcome.state_bytes, session.state_bytes if session and session.state is None else 0)
        return self._record(cell, outcome, state, peak(), time.monotonic() - start)

    def _record(self, cell: Cell, outcome: Outcome, state: int, peak: int, seconds: float) -> Record:
        usage = outcome.usage
        weights_read = 1.0 - usage.mask_sparsity
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
            memory={"weights": self.shape.weight_bytes, "state": state, "peak": peak},
            settings={"batch_size": self.config.batch_size},
            environment=environment(),
            seconds=seconds,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            samples=outcome.samples,
        )


@contextlib.contextmanager
def _peak_memory(device: str) -> Iterator[Callable[[], int]]:
    """Yields a function that tells the peak in bytes since the block began: GPU memory, or the process on a CPU."""
    if device == "cuda":
        import torch

        cards = range(torch.cuda.device_count())
        for card in cards:
            torch.cuda.reset_peak_memory_stats(card)
        yield lambda: sum(torch.cuda.max_memory_allocated(card) for card in cards)
        return
    # Linux resets VmHWM on request; elsewhere the peak is that of the process so far.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    yield _peak_rss


def _peak_rss() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Silent:
    """A view that shows nothing."""

    def __getattr__(self, _name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None
