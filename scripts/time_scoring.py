"""Time how fast answers are scored, dense, beside lm-eval's own `HFLM`.

    python scripts/time_scoring.py --tasks arc,hellaswag --limit 50 --data-dir DIR

All sides are timed in turn, round after round: other work on the machine hits them alike, and a ratio is the median
over rounds of times that stood side by side. Times are of `loglikelihood(requests)`: tokenisation, forwards, logits.

Tokens are counted where they are computed, by hooks: rows x width of the decoder's inputs, padding included, and rows
that go through the output head. What must be computed, without padding: each distinct context once, with a prefix that
contexts share (`batching.shared_prefixes`) once; of each distinct continuation all tokens but the last, which is only
predicted; and one row of logits for each distinct position whose next token is asked for.

The limit is the time for just that at the speed of well-filled forwards of this model: the decoder's on full rows as
long as the mean input, the head's on as many rows as fit in its memory, log-softmax included; measured in every round.
`limit_share` is limit / time, the median over rounds: 1 is a scorer without padding, small batches or bookkeeping.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from dart_eval.evaluation.batching import CPU_TOKENS, budget, shared_prefixes
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.logits import LOGIT_BYTES, Answers
from dart_eval.evaluation.requests import Request, Score
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.layers.find import decoder
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import Session
from dart_eval.results.show import Table, markdown
from dart_eval.sweep.options import AUTO
from dart_eval.util.errors import UserError
from dart_eval.util.machine import timed

METRICS = ("acc", "acc_norm")  # per document, if a task has them


@dataclass
class Computed:
    """Tokens through the decoder (rows x width), and rows through the output head."""

    tokens: int = 0
    logits: int = 0


@dataclass
class Side:
    """One scorer on one task.

    Attributes:
        seconds: per round. computed: in one round.
        ratio: stock's seconds / its own, median over rounds. limit_share: see the module.
        same: every document has stock's accuracies. difference: largest of log-likelihoods to stock's.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    computed: Computed = field(default_factory=Computed)
    ratio: float = 1.0
    limit_share: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    same: bool = True
    difference: float = 0.0


@dataclass
class TaskSpeed:
    """One task: stock `HFLM` first, then ours at the same batch size, and ours under `auto`.

    Attributes:
        items: documents. requests: answers scored.
        needed: what must be computed. limit_seconds: the least time for it, per round.
    """

    task: str
    items: int
    requests: int
    num_fewshot: int | None
    batch_size: int
    sides: list[Side]
    needed: Computed
    limit_seconds: list[float]


class _Watched(PrunedLM):
    """Our dense scorer, which records the requests that reach it."""

    requests: list[Request]

    def _score(self, requests: list[Request], kind: str = "loglikelihood") -> list[Score]:
        self.requests = requests
        return super()._score(requests, kind)


def measure(
    model: Any, tokenizer: Any, tasks: Tasks, name: str, batch_size: int = 8, rounds: int = 3,
    limit: int | None = None, num_fewshot: int | None = None, seed: int = 0,
) -> TaskSpeed:  # fmt: skip
    """Score one task with stock `HFLM` and ours in turn, `rounds` times.

    Raises:
        UserError: the task does not score answers, or nothing is to be measured.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds} must be at least 1")
    members = leaves(list(tasks.load(name)))
    instances = build(members, limit, num_fewshot, seed)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    ours = {size: _Watched(model, tokenizer, size) for size in (batch_size, AUTO)}
    sides = [Side("HFLM"), *(Side(f"dart-eval, {size}") for size in ours)]
    for lm in ours.values():
        lm.begin(Session(), {})

    def score(lm: PrunedLM) -> list[tuple[float, bool]]:
        lm.begin(Session(), {})  # a new journal: no answer comes from it
        return lm.loglikelihood(instances)

    works: list[Callable[[], Any]] = [lambda: stock.loglikelihood(instances, disable_tqdm=True)]
    works += [lambda lm=lm: score(lm) for lm in ours.values()]  # type: ignore[misc]
    for lm in (stock, *ours.values()):
        lm.loglikelihood(instances[:2], disable_tqdm=True)  # the first forwards pay for allocations
    answers: list[list[tuple[float, bool]]] = [[] for _ in works]
    limits: list[float] = []
    needed = Computed()
    for _ in range(rounds):
        for i, (side, work) in enumerate(zip(sides, works, strict=True)):
            with counted(model) as computed:
                seconds, answers[i] = timed(work, model.device)
            side.seconds.append(seconds)
            side.computed = computed
            if i == 1:  # between our two sides, so that all three see the same machine
                needed, least = _limit(model, ours[batch_size])
                limits.append(least)
    by_document = [accuracies(instances, members, found) for found in answers]
    for side, found, metrics in zip(sides, answers, by_document, strict=True):
        side.ratio = statistics.median(a / b for a, b in zip(sides[0].seconds, side.seconds, strict=True))
        side.limit_share = statistics.median(a / b for a, b in zip(limits, side.seconds, strict=True))
        for metric in METRICS:
            if values := [m[metric] for m in metrics.values() if metric in m]:
                side.accuracy[metric] = statistics.mean(values)
        side.same = metrics == by_document[0]
        side.difference = max(abs(a[0] - b[0]) for a, b in zip(found, answers[0], strict=True))
    return TaskSpeed(name, len(by_document[0]), len(instances), num_fewshot, batch_size, sides, needed, limits)


def _limit(model: Any, lm: _Watched) -> tuple[Computed, float]:
    """Return the work that the requests of a run need, and the least time for it."""
    needed = needed_for(lm.requests, lm.budget.forward)
    width = round(statistics.mean(len(r.context) + len(r.continuation) - 1 for r in lm.requests))
    token, row = unit_costs(model, lm._head, width)
    return needed, token * needed.tokens + row * needed.logits


def build(members: Sequence[Task], limit: int | None, num_fewshot: int | None, seed: int) -> list[Instance]:
    """Return the requests that `lm_eval.simple_evaluate` would build from these tasks, in its order.

    Raises:
        UserError: a task does not score answers.
    """
    random.seed(seed)
    np.random.seed(seed)
    instances = []
    for task in members:
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise UserError(f"task {task.task_name} scores no answers", "for example --tasks arc,hellaswag,mmlu")
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 in a task's file is meant to stay
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        instances += task.instances
    return instances


def accuracies(
    instances: Sequence[Instance], members: Sequence[Task], answers: Sequence[tuple[float, bool]]
) -> dict[tuple[str, int], dict[str, float]]:
    """Return the metrics of METRICS that the task has, for every document (task, number)."""
    tasks = {task.task_name: task for task in members}
    by_document: dict[tuple[str, int], list[tuple[int, Instance, tuple[float, bool]]]] = defaultdict(list)
    for instance, answer in zip(instances, answers, strict=True):
        by_document[str(instance.task_name), int(instance.doc_id or 0)].append((instance.idx, instance, answer))
    found = {}
    for (name, number), rows in by_document.items():
        rows.sort(key=lambda row: row[0])
        metrics = tasks[name].process_results(rows[0][1].doc, [answer for _, _, answer in rows])
        found[name, number] = {m: float(metrics[m]) for m in METRICS if m in metrics}
    return found


def needed_for(requests: Sequence[Request], forward: int) -> Computed:
    """Return the work that dense scoring of these requests needs; `forward`: see `batching.Budget`."""
    contexts = list(dict.fromkeys(r.context for r in requests))
    tokens = sum(
        group.prefix + sum(len(contexts[i]) - group.prefix for i in group.members)
        for group in shared_prefixes(contexts, forward)
    )
    tokens += sum(len(c) for _, c in {(r.context, r.continuation[:-1]) for r in requests})
    asked = {(r.context, r.continuation[:k]) for r in requests for k in range(len(r.continuation))}
    return Computed(tokens, len(asked))


@torch.no_grad()
def unit_costs(model: Any, head: Callable[[torch.Tensor], torch.Tensor], width: int) -> tuple[float, float]:
    """Return seconds per token of a well-filled dense forward on rows of `width` tokens, and per row of logits."""
    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    rows = max(1, (budget(AUTO, model).tokens or CPU_TOKENS) // width)
    ids = torch.randint(config.vocab_size, (rows, width), device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    token, out = timed(lambda: model.base_model(**given), device)
    answers = Answers(head, config.vocab_size)
    states = out[0].flatten(0, 1)
    count = max(1, LOGIT_BYTES // (4 * config.vocab_size))
    for k in range(count):
        node = answers.root()
        answers.ask(node, (k % config.vocab_size,))
        answers.give([node], states[k % len(states)][None])
    return token / ids.numel(), timed(answers.run, device)[0] / count


@contextmanager
def counted(model: Any) -> Iterator[Computed]:
    """Count the model's work inside the block."""
    computed = Computed()

    def tokens(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        ids: torch.Tensor = next(x for x in given if x is not None)
        computed.tokens += ids.shape[0] * ids.shape[1]

    def logits(_module: Any, args: tuple[Any, ...]) -> None:
        computed.logits += args[0].shape[:-1].numel()

    with (
        decoder(model).register_forward_pre_hook(tokens, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(logits),
    ):
        yield computed


def dense_table(results: Sequence[TaskSpeed], model: str) -> Table:
    """Return time and work of each scorer, and the limit."""
    columns = ["task", "scorer", "seconds", "speed-up", "tokens", "logits", "share", "same", "apart"]
    body: list[list[str]] = []
    for f in results:
        for side in f.sides:
            body.append([
                f.task, side.name, f"{statistics.median(side.seconds):.2f}", f"{side.ratio:.2f}",
                str(side.computed.tokens), str(side.computed.logits), f"{side.limit_share:.2f}",
                "yes" if side.same else "no", f"{side.difference:.1e}",
            ])  # fmt: skip
        needed = [str(f.needed.tokens), str(f.needed.logits)]
        body.append([f.task, "limit", f"{statistics.median(f.limit_seconds):.2f}", "", *needed, *[""] * 3])
    counts = "; ".join(f"{f.task}: {f.items} items, {f.requests} answers" for f in results)
    note = (
        f"Batch size {results[0].batch_size}, medians of {len(results[0].limit_seconds)} rounds. speed-up: HFLM's "
        "seconds / the scorer's. same: every document has HFLM's accuracies. apart: largest difference of a "
        f"log-likelihood. {counts}."
    )
    return Table(f"Scoring: {model}", columns, body, [note])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tasks", default="arc,hellaswag,mmlu")
    parser.add_argument("--data-dir")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    shelf, resolved = Tasks(given.data_dir), resolve(ModelSpec(given.model))
    model, tokenizer = resolved.load(print)
    sizes = {name: getattr(given, name) for name in ("batch_size", "rounds", "limit", "num_fewshot")}
    names, title = shelf.expand(given.tasks.split(",")), resolved.identity.name
    print(markdown(dense_table([measure(model, tokenizer, shelf, n, **sizes) for n in names], title)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
