"""Where the cells of a plan run: in this process, in several on this machine, or on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dart_eval.models.loaded import Loaded
    from dart_eval.sweep.events import Tell
    from dart_eval.sweep.options import RunConfig
    from dart_eval.sweep.run import RunResult


def run_all(
    configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False, model: Loaded | None = None
) -> RunResult:
    """Run several sweeps of one model into one folder, where the first one says.

    Args:
        configs: they differ in methods, sparsities, bits, tasks, few-shot and limit only.
        skip_missing: go on without tasks whose data cannot be had, and report them.
        model: a loaded one, which this process takes in place of that of the configurations.

    Raises:
        UserError: the input is wrong. Nothing has been written.
    """
    if configs[0].ray is not None:
        from dart_eval.cluster import cluster

        return cluster.run_all(configs, tell, skip_missing)
    from dart_eval.sweep import run, workers

    if configs[0].workers > 1:
        return workers.run_all(configs, tell, skip_missing)
    return run.run_all(configs, tell, skip_missing, model)
