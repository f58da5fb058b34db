"""`dart-eval bench --scoring`: the benchmark of scoring, and its table."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.cli.view import output, print_note
from dart_eval.errors import UserError
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.scoring import TaskSpeed
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models import ModelSpec
    from dart_eval.pruning.method import Pruner


@dataclass(frozen=True)
class Asked:
    """What is scored: the options of `dart-eval bench --scoring`."""

    tasks: str
    data_dir: str | None
    batch_size: int
    rounds: int
    limit: int | None
    num_fewshot: int | None

    def names(self, shelf: Tasks) -> list[str]:
        """The tasks, each loaded: what is missing shows before anything runs.

        Raises:
            UserError: a name, number or folder is wrong.
        """
        for name, least in (("batch_size", 1), ("rounds", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        names = shelf.expand([name.strip() for name in self.tasks.split(",") if name.strip()])
        if not names:
            raise UserError("no task given", "for example --tasks arc,hellaswag,mmlu")
        for name in names:
            shelf.load(name)
        return names


def run(asked: Asked, spec: ModelSpec, methods: list[Pruner] | None, sparsity: float, format: str) -> None:
    """Measure every task, dense or under methods, and print the table.

    Args:
        methods: those to time, each beside the first; None measures dense beside lm-eval's own scorer.

    Raises:
        UserError: a name, number or folder is wrong; a task does not score answers; a method does not prune.
    """
    if methods is None:
        _run_dense(asked, spec, format)
    else:
        _run_methods(asked, spec, methods, sparsity, format)


def _run_dense(asked: Asked, spec: ModelSpec, format: str) -> None:
    from dart_eval.bench.scoring import measure
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models import resolve

    shelf, resolved = Tasks(asked.data_dir), resolve(spec)
    names = asked.names(shelf)
    model, tokenizer = resolved.load(print_note)
    sizes = asked.batch_size, asked.rounds, asked.limit, asked.num_fewshot
    found = [measure(model, tokenizer, shelf, name, *sizes) for name in names]
    output([dataclasses.asdict(f) for f in found], table(found, resolved.identity.name), format)


def _run_methods(asked: Asked, spec: ModelSpec, methods: list[Pruner], sparsity: float, format: str) -> None:
    from dart_eval.bench.methods import measure
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models import resolve

    shelf, resolved = Tasks(asked.data_dir), resolve(spec)
    names = asked.names(shelf)
    model, tokenizer = resolved.load(print_note)
    sizes = asked.batch_size, asked.rounds, asked.limit, asked.num_fewshot
    found = [row for name in names for row in measure(model, tokenizer, shelf, name, methods, sparsity, *sizes)]
    first = methods[0].spec
    body = [
        [f.task, f.method, f"{f.sparsity:g}", f"{f.read:.3f}", f"{f.seconds:.2f}",
         f"{f.ratio.median:.2f} [{f.ratio.low:.2f}, {f.ratio.high:.2f}]"]
        for f in found
    ]  # fmt: skip
    note = (
        f"Answers scored by masks, which skips no work: how long a method's own work takes. x {first}: median over "
        f"{asked.rounds} rounds of a method's time over {first}'s in the same round, and quartiles; the last row of a "
        f"task is {first} again, which should be 1."
    )
    heads = ["task", "method", "sparsity", "read", "seconds", f"x {first}"]
    made = Table(f"Scoring under methods: {resolved.identity.name}", heads, body, note)
    output([dataclasses.asdict(f) for f in found], made, format)


def table(found: list[TaskSpeed], model: str) -> Table:
    """All tasks, for people: what each side took and computed, and what would have been enough."""
    columns = [
        "task", "scorer", "seconds", "x stock", "tokens", "logit rows", "of limit", "acc", "acc_norm", "same",
        "max |difference|",
    ]  # fmt: skip
    body: list[list[str]] = []
    rules = set()
    for f in found:
        rules.add(len(body))
        for side in f.sides:
            body.append([
                f.task, side.name, f"{statistics.median(side.seconds):.2f}", f"{side.ratio:.2f}",
                str(side.computed.tokens), str(side.computed.logits), f"{side.limit_share:.2f}",
                *(f"{side.accuracy[m]:.4f}" if m in side.accuracy else "-" for m in ("acc", "acc_norm")),
                "yes" if side.same else "no", f"{side.difference:.1e}",
            ])  # fmt: skip
        needed = [str(f.needed.tokens), str(f.needed.logits)]
        body.append([f.task, "limit", f"{statistics.median(f.limit_seconds):.2f}", "", *needed, *[""] * 5])
    counts = "; ".join(
        f"{f.task}: {f.items} items, {f.requests} answers"
        + ("" if f.foreign_cores is None else f", other processes kept {f.foreign_cores:.1f} cores busy")
        for f in found
    )
    shots = "" if found[0].num_fewshot is None else f", {found[0].num_fewshot} shots"
    note = (
        f"Model {model}, dense, batch size {found[0].batch_size}{shots}, medians of {len(found[0].limit_seconds)} "
        "rounds in which all sides were timed in turn. Tokens: rows x width through the decoder, padding included. "
        "Limit: what must be computed (each distinct context, shared prefix and continuation once, no padding), at "
        "the speed of well-filled forwards of this model; of limit: that time over the scorer's. Same: every document "
        f"has stock's accuracies. {counts}."
    )
    return Table("Scoring", columns, body, note, rules=frozenset(rules - {0}))
