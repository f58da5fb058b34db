"""`dart-eval bench scoring`: how fast answers are scored, and its tables."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval import task_names
from dart_eval.cli import bench_options, complete, options
from dart_eval.cli.run import hush, quieten
from dart_eval.cli.view import output, print_note
from dart_eval.errors import UserError
from dart_eval.results.format import sparsity as said
from dart_eval.results.writers import Table

if TYPE_CHECKING:
    from dart_eval.bench.scoring import TaskSpeed
    from dart_eval.evaluation.tasks import Tasks
    from dart_eval.models import ModelSpec
    from dart_eval.pruning.method import Pruner

Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Time these methods, comma-separated, each beside the first of them.  "
        r"\[default: none; dense is timed beside lm-eval's HFLM]",
        rich_help_panel=options.PRUNING,
        autocompletion=complete.listed(complete.methods),
    ),
]
TaskNames = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Score the answers of these tasks, comma-separated.",
        rich_help_panel=options.TASKS,
        autocompletion=complete.listed(complete.tasks),
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", help="Ask only the first N items of each task.", rich_help_panel=options.TASKS),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=r"Put so many examples before each item.  \[default: the task's own]",
        rich_help_panel=options.TASKS,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Run so many contexts in a forward, on all sides. Without --method, auto is timed too.",
        rich_help_panel=bench_options.TIMING,
    ),
]


def scoring(
    tasks: TaskNames = "arc,hellaswag,mmlu",
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    data_dir: options.DataDir = None,
    method: Methods = None,
    sparsity: options.OneSparsity = 0.7,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = None,
    batch_size: BatchSize = 8,
    rounds: bench_options.Rounds = 3,
    format: bench_options.Format = "table",
) -> None:
    """Measure how fast answers are scored: dense beside lm-eval's HFLM, or under methods.

    Without --method, dense scoring is timed beside lm-eval's own, and the
    tokens that both compute are counted. With --method, each method is timed
    beside the first of them. As in `dart-eval run`, masks skip no work, so
    the table shows how long a method's own work takes.

    \b
    [bold]Examples[/bold]
    dart-eval bench scoring --tasks arc,hellaswag --limit 50 --data-dir DIR
    dart-eval bench scoring --tasks arc --method griffin,cats --sparsity 0.5
    """
    hush(False)
    bench_options.check_format(format)
    asked = Asked(tasks, data_dir, batch_size, rounds, limit, num_fewshot)
    asked.check()
    methods = bench_options.chosen(method, sparsity, "griffin,cats") if method is not None else None
    chosen = options.chosen_model(model=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    quieten(False)  # it imports torch, and all before it does not

    if methods is None:
        _run_dense(asked, chosen.model_spec, format)
    else:
        _run_methods(asked, chosen.model_spec, methods, sparsity, format)


@dataclass(frozen=True)
class Asked:
    """What is scored: the options of `dart-eval bench scoring`."""

    tasks: str
    data_dir: str | None
    batch_size: int
    rounds: int
    limit: int | None
    num_fewshot: int | None

    @property
    def typed(self) -> list[str]:
        """The names of tasks as they were typed."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def check(self) -> None:
        """Refuse numbers and names that cannot be.

        Raises:
            UserError: with the first of them.
        """
        for name, least in (("batch_size", 1), ("rounds", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if not self.typed:
            raise UserError("no task given", "for example --tasks arc,hellaswag,mmlu")
        task_names.check(self.typed)

    def names(self, shelf: Tasks) -> list[str]:
        """The tasks, each loaded: what is missing shows before anything runs.

        Raises:
            UserError: the data of one cannot be had.
        """
        names = shelf.expand(self.typed)
        for name in names:
            shelf.load(name)
        return names


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
        [f.task, f.method, said(f.sparsity), f"{f.read:.3f}", f"{f.seconds:.2f}",
         f"{f.ratio.median:.2f} [{f.ratio.low:.2f}, {f.ratio.high:.2f}]"]
        for f in found
    ]  # fmt: skip
    note = (
        f"Answers are scored by masks, which skip no work: what is seen is how long a method's own work takes. "
        f"x {first}: a method's time / {first}'s in the same round, the median of {_rounds(asked.rounds)} and its "
        f"quartiles. The last row of a task is {first} again, which should be 1."
    )
    heads = ["task", "method", "sparsity", "read", "seconds", f"x {first}"]
    made = Table(f"Scoring under methods: {resolved.identity.name}", heads, body, note)
    output([dataclasses.asdict(f) for f in found], made, format)


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count > 1)}"


def table(found: list[TaskSpeed], model: str) -> Table:
    """All tasks, for people: what each side took and computed, and what would have been enough."""
    columns = ["task", "scorer", "seconds", "speed-up", "tokens", "logits", "share", "same", "apart"]
    body: list[list[str]] = []
    rules = set()
    for f in found:
        rules.add(len(body))
        for side in f.sides:
            body.append([
                f.task, side.name, f"{statistics.median(side.seconds):.2f}", f"{side.ratio:.2f}",
                str(side.computed.tokens), str(side.computed.logits), f"{side.limit_share:.2f}",
                "yes" if side.same else "no", f"{side.difference:.1e}",
            ])  # fmt: skip
        needed = [str(f.needed.tokens), str(f.needed.logits)]
        body.append([f.task, "limit", f"{statistics.median(f.limit_seconds):.2f}", "", *needed, *[""] * 3])
    counts = "; ".join(
        f"{f.task}: {f.items} items, {f.requests} answers"
        + ("" if f.foreign_cores is None else f", other processes kept {f.foreign_cores:.1f} cores busy")
        for f in found
    )
    shots = "" if found[0].num_fewshot is None else f", {found[0].num_fewshot} shots"
    note = (
        f"Model {model}, dense, batch size {found[0].batch_size}{shots}, medians of "
        f"{_rounds(len(found[0].limit_seconds))} in which all sides were timed in turn. Speed-up: HFLM's seconds / the "
        "scorer's. Tokens: rows x width through the decoder, padding included; logits: rows through the output head. "
        "Limit: the time for what must be computed (each distinct context, shared prefix and continuation once, no "
        "padding), at the speed of well-filled forwards of this model; share: that time / the scorer's. Same: every "
        "document has the accuracies that it has under HFLM; apart: the largest difference of a log-likelihood. "
        f"{counts}."
    )
    return Table("Scoring", columns, body, note, rules=frozenset(rules - {0}))
