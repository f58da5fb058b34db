"""The scoring times under methods, relative to the first method: same process, model and requests.

All methods are timed in turn, round after round, with the first one again as a control that should be as fast as
itself. Times are of `loglikelihood(requests)` under a session that multiplies by masks, as `dart-eval run` does:
what a method's own work costs shows here, what skipped neurons would save does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.bench.scoring import build
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.prune import prune
from dart_eval.results.ratio import Ratio, paired
from dart_eval.util.errors import UserError
from dart_eval.util.machine import wait


@dataclass(frozen=True)
class MethodSpeed:
    """One method on one task. ratio: its seconds / those of the first method, round by round; control: the first again.

    read: FFN weights that a pruned token multiplies / all of them, over the answers.
    """

    task: str
    method: str
    sparsity: float
    seconds: float
    ratio: Ratio
    read: float


def measure(
    model: Any, tokenizer: Any, tasks: Tasks, name: str, methods: Sequence[Pruner], sparsity: float,
    batch_size: int = 8, rounds: int = 3, limit: int | None = None, num_fewshot: int | None = None,
) -> list[MethodSpeed]:  # fmt: skip
    """Score one task under each method in turn, `rounds` times after one that warms up.

    Returns:
        One entry a method, the first of them once more at the end (the control).

    Raises:
        UserError: the task does not score answers, or a method does not prune.
    """
    if idle := [m.name for m in methods if not m.prunes]:
        raise UserError(f"{idle[0]} does not prune", "leave it out: without --method dense scoring is timed")
    instances = build(leaves(list(tasks.load(name))), limit, num_fewshot, seed=0)
    lm = PrunedLM(model, tokenizer, batch_size)
    rows = [*methods, methods[0]]
    times: list[list[float]] = [[] for _ in rows]
    reads = [1.0] * len(rows)
    for _ in range(1 + rounds):
        for i, method in enumerate(rows):
            with prune(model, method, sparsity, tokenizer=tokenizer, execution="masked") as session:
                lm.begin(session, {})
                start = time.perf_counter()
                lm.loglikelihood(instances)
                wait(model.device)
                times[i].append(time.perf_counter() - start)
            reads[i] = sum(lm.costs.values(), start=Cost()).read
    return [
        MethodSpeed(
            name, m.spec, sparsity if m.sized else 0.0, statistics.median(t[1:]), paired(t[1:], times[0][1:]), read
        )
        for m, t, read in zip(rows, times, reads, strict=True)
    ]
