"""Log finished cells with wandb or trackio, whose API is the same as far as it is used here.

A run of the tracker is one curve: one task under one method with its parameters, a row per sparsity. Charts are named
`<task>/<metric>`, so the methods of a task lie over each other, against sparsity, in both tools as they come. One run
per cell, lm-eval's way, would be a single point, and trackio cannot join points of several runs; one run per sweep
would draw every method in a chart of its own. A sweep runs the sparsities of a curve one after the other, so one run is
open at a time. The runs of an output folder share a group: a curve that was continued later is two runs of one name.

The records in the output folder stay the results. A tracker that fails is reported once and never fails a cell.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from dart_eval.results.record import Record
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import View
from dart_eval.sweep.plan import Cell
from dart_eval.util.errors import UserError, nearest

KINDS = ("trackio", "wandb")
MAX_FAILURES = 3  # without a row that got through, then the tracker is left alone: each may have cost a time-out


@contextlib.contextmanager
def tracked(view: View, kind: str | None, project: str, config: RunConfig) -> Iterator[View]:
    """`view`, with every finished cell also logged to the tracker `kind`; None is `view` alone.

    The last run of the tracker is closed when the block ends, as failed if it ends by an exception.

    Args:
        kind: one of `KINDS`.
        project: name of the tracker's project.

    Raises:
        UserError: the tracker is unknown, not installed, or would not let the user in.
    """
    if kind is None:
        yield view
        return
    tracker = _Tracker(_load(kind), kind, project, Path(config.output).absolute().name, view.note)
    try:
        yield cast(View, _Tracked(view, tracker))
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()


class _Tracked:
    """A view that also logs; everything else goes to the view it wraps."""

    def __init__(self, view: View, tracker: _Tracker) -> None:
        self._view, self._tracker = view, tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def finished(self, cell: Cell, record: Record) -> None:
        self._view.finished(cell, record)  # first, as the tracker may be slow
        self._tracker.log(cell, record)


class _Tracker:
    """The tracker's run of the curve in progress."""

    def __init__(self, module: Any, kind: str, project: str, group: str, note: Callable[[str], None]) -> None:
        self.module, self.kind, self.project, self.group, self.note = module, kind, project, group, note
        self.run: Any = None
        self.curve = ""  # what the open run's cells have in common
        self.failures = 0  # since a row got through
        self.told = self.warned = False

    def log(self, cell: Cell, record: Record) -> None:
        """Add a cell to its curve, or begin one."""
        settings = {k: v for k, v in record.inputs.items() if k != "sparsity"}
        curve = json.dumps(settings, sort_keys=True, default=str)
        if curve != self.curve or self.run is None:
            self.close()
            self.curve = curve
            self._try(self._open, f"{cell.task} {cell.method.spec}", settings)
        if self.run is not None and not self.told:
            self.told = True
            self.note(f"logging to {self.kind}: {self._where()}")
        if self.run is not None and self._try(lambda: self.run.log(row(record))):
            self.failures = 0

    def close(self, failed: bool = False) -> None:
        """Finish the open run, if there is one."""
        run, self.run = self.run, None
        if run is not None:
            if self.kind == "wandb":
                self._try(run.finish, exit_code=int(failed))
            else:  # has no word for failure; the run's own `finish` would be called again at the process's end
                self._try(self.module.finish)

    def _open(self, name: str, settings: dict[str, Any]) -> None:
        more: dict[str, Any] = {}
        if self.kind == "wandb":
            more = {
                "reinit": "finish_previous",  # one that failed may still be open
                "settings": self.module.Settings(silent=True, console="off"),  # our own view prints
            }
        self.run = self.module.init(project=self.project, name=name, group=self.group, config=settings, **more)
        if hasattr(self.run, "define_metric"):  # trackio has none: there `sparsity` is chosen as the x-axis
            self.run.define_metric("sparsity")
            self.run.define_metric("*", step_metric="sparsity")

    def _where(self) -> str:
        if self.kind == "trackio":
            return f"see `trackio show --project {shlex.quote(self.project)}`, sparsity as the x-axis, smoothing 0"
        return "offline, to be sent with `wandb sync`" if self.run.offline else str(self.run.url)

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> bool:
        """Call the tracker; whatever it raises is reported once and costs its run, nothing else."""
        if self.failures >= MAX_FAILURES:
            return False
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call(*args, **options)
            return True
        except Exception as error:
            self.run = None
            self.failures += 1
            if not self.warned:
                self.warned = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self.note(f"{self.kind} failed ({reason}); the results are in the output folder all the same")
            return False


def row(record: Record) -> dict[str, float]:
    """What one cell adds to its curve: sparsities, its metrics with their standard errors, and what it cost.

    Members of a group (mmlu's subjects) are left to the record.
    """
    found: dict[str, float] = {
        "sparsity": record.inputs["sparsity"], "effective_sparsity": record.effective_sparsity,
        "mask_sparsity": record.mask_sparsity, "weights_read": record.weights_read,
        "seconds": record.seconds, "tokens": record.tokens, "remasks": record.remasks,
    }  # fmt: skip
    for m in record.metrics:
        if m.part_of is None:
            found[f"{m.task}/{m.metric}"] = m.value
            if m.stderr is not None:
                found[f"{m.task}/{m.metric}_stderr"] = m.stderr
    for place, numbers in (("flops", record.flops), ("memory", record.memory)):
        found.update({f"{place}/{k}": v for k, v in numbers.items() if isinstance(v, (int, float))})
    return found


def _load(kind: str) -> Any:
    """The tracker's module, ready to log."""
    if kind not in KINDS:
        raise UserError(f"unknown tracker {kind!r}", nearest(kind, KINDS))
    try:
        module = importlib.import_module(kind)
    except ImportError:
        raise UserError(f"--log {kind} needs the package {kind}", f"run pip install 'dart-eval[{kind}]'") from None
    if kind == "wandb" and module.setup().settings.mode == "online":
        # Asked now, not after the first cell, and without a prompt that would wait in the middle of a run.
        remedy = "run `wandb login`, or set WANDB_MODE=offline and upload the runs later with `wandb sync`"
        try:
            inside = module.login(prompt=False)
        except Exception as error:
            raise UserError(f"wandb cannot log in ({' '.join(str(error).split())[:200]})", remedy) from None
        if not inside:
            raise UserError("wandb has no API key", remedy)
    return module
