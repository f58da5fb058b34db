"""`dart-eval bench --scoring`: the benchmark of scoring, and its table."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from dart_eval.cli.view import output, print_note
from dart_eval.errors import UserError
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.scoring import TaskSpeed
    from dart_eval.models import ModelSpec


def run(
    tasks: str,
    spec: ModelSpec,
    data_dir: str | None,
    batch_size: int,
    rounds: int,
    limit: int | None,
    num_fewshot: int | None,
    format: str,
) -> None:
    """Measure every task, and print the table.

    Raises:
        UserError: a name, number or folder is wrong; a task does not score answers.
    """
    from dart_eval.bench.scoring import measure
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models import resolve

    for name, value, least in (
        ("batch-size", batch_size, 1), ("rounds", rounds, 1), ("limit", limit, 1), ("num-fewshot", num_fewshot, 0)
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    shelf = Tasks(data_dir)
    names = shelf.expand([name.strip() for name in tasks.split(",") if name.strip()])
    if not names:
        raise UserError("no task given", "for example --tasks arc,hellaswag,mmlu")
    resolved = resolve(spec)
    for name in names:
        shelf.load(name)  # what is missing shows before anything runs
    model, tokenizer = resolved.load(print_note)
    found = [measure(model, tokenizer, shelf, name, batch_size, rounds, limit, num_fewshot) for name in names]
    output([dataclasses.asdict(f) for f in found], table(found, resolved.identity.name), format)


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
