"""Log finished cells with Weights & Biases through lm-eval's own logger, a run of the tracker per cell.

The records in the output folder stay the results. A tracker that fails is noted once and never fails a cell.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any, cast

from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import View
from dart_eval.sweep.plan import Cell
from dart_eval.util.errors import UserError

MAX_FAILURES = 3  # then the tracker is left alone: each may have cost a time-out


def tracked(view: View, config: RunConfig) -> View:
    """Return `view`, with every finished cell also logged if the configuration says so."""
    if config.log is None:
        return view
    try:
        wandb = importlib.import_module("wandb")
        # Asked now, not after the first cell, and without a prompt that would wait in the middle of a run.
        problem = "" if wandb.setup().settings.mode != "online" or wandb.login(prompt=False) else "no API key"
    except ImportError:
        raise UserError("--log wandb needs the package wandb", "pip install 'dart-eval[wandb]'") from None
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
    if problem:
        raise UserError(f"wandb cannot log in ({problem})", "`wandb login`, or set WANDB_MODE=offline")
    return cast(View, _Tracked(view, wandb, config))


class _Tracked:
    """A view that also logs; everything else goes to the view it wraps."""

    def __init__(self, view: View, wandb: Any, config: RunConfig) -> None:
        self._view, self._wandb, self._config, self._failures = view, wandb, config, 0
        self._ours: set[str] = set()  # keys of the cells that this run makes: others may share the folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def started(self, cell: Cell, requests: int) -> None:
        self._ours.add(cell.key)
        self._view.started(cell, requests)

    def finished(self, cell: Cell, record: Record) -> None:
        self._view.finished(cell, record)  # first, as the tracker may be slow
        if self._failures == MAX_FAILURES or cell.key not in self._ours:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._log(cell, record)
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._view.note(f"wandb failed ({reason}); the results are in the output folder all the same")

    def _log(self, cell: Cell, record: Record) -> None:
        from lm_eval.loggers import WandbLogger

        from dart_eval.export.facts import facts
        from dart_eval.export.lm_eval import Run, results_of

        folder = Path(self._config.output).absolute()
        logger = WandbLogger({
            "project": self._config.log_project, "group": folder.name, "name": cell.title, "config": record.inputs,
            "settings": self._wandb.Settings(silent=True, console="off"),  # our own view prints
        })  # fmt: skip
        try:
            made = facts(Store(folder), [record])
            logger.post_init(results_of(Run(made), {}))
            logger.log_eval_result()
            logger.run.summary.update({**made[0].details(), "flops": record.flops, "seconds": record.seconds})
        finally:
            logger.run.finish()
