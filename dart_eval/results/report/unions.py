"""Read at batch B, and of k tokens of one sequence: how fast the union of what tokens choose grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dart_eval.results.format import THREE, percent
from dart_eval.results.labels import labels
from dart_eval.results.record import Record
from dart_eval.results.report.charts import LONGEST, Chart, Line, Point
from dart_eval.results.writers import Table

EIGHT_BITS, MOST = 8.5 / 16, 0.9  # what rounding to 8 bits reads at any batch, and nearly everything
TITLES = {"sequences": "Read at batch B", "tokens": "Read of k tokens"}
ABOUT = {"sequences": "B sequences", "tokens": "k consecutive tokens of one sequence, such as drafts"}
AXES = {"sequences": "sequences in a step", "tokens": "tokens of a sequence in a step"}
REMEDY = "run with --read-at-batch, and --force for finished cells"
Cell = tuple[str, Record, dict[int, tuple[float, float]]]  # label, record, size of a group -> its read and error


def tables(records: Sequence[Record]) -> list[Table]:
    """Return what a step of B sequences reads, and one of k tokens of a sequence; nothing if no cell measured it."""
    return [_table(kind, cells, len(records) - len(cells)) for kind in TITLES if (cells := _cells(kind, records))]


def charts(records: Sequence[Record], looks: Mapping[str, int]) -> list[Chart]:
    """Return the same as charts, two for each task.

    Args:
        records: of one model. looks: label -> the number of its look; others follow in order.
    """
    tasks = dict.fromkeys(_task(r) for r in records)
    each = [(kind, task, _cells(kind, [r for r in records if _task(r) == task])) for task in tasks for kind in TITLES]
    return [_chart(kind, task, cells, looks) for kind, task, cells in each if cells]


def _task(record: Record) -> str:
    return str(record.inputs["task"])


def _cells(kind: str, records: Sequence[Record]) -> list[Cell]:
    """Return the cells that measured it, by model and task, the methods in the order of their names."""
    names = labels(records)
    made = []
    for r in (r for r in records if r.read_at_batch):
        reads = {int(n): (read, error or 0.0) for n, (read, error, _) in (r.read_at_batch or {})[kind].items()}
        made.append((names[r.key], r, dict(sorted(reads.items()))))  # a file has 16 before 2
    return sorted(made, key=lambda c: (c[1].inputs["model"]["name"], _task(c[1]), c[0], c[1].inputs["sparsity"]))


def _table(kind: str, cells: Sequence[Cell], missing: int) -> Table:
    sizes = sorted({n for *_, reads in cells for n in reads})
    error = max(error for *_, reads in cells for _, error in reads.values())
    body = []
    for label, record, reads in cells:
        shares = [THREE(reads[n][0]) if n in reads else "-" for n in sizes]
        ends = [next((str(n) for n, (read, _) in reads.items() if read > limit), "-") for limit in (EIGHT_BITS, MOST)]
        body.append([record.inputs["model"]["name"], _task(record), label, *shares, *ends])
    note = (
        f"Share of the FFN bytes that a step reads for {ABOUT[kind]}: each neuron or column once, in the most bits "
        f"that one of them wants. Mean over layers and steps; standard errors up to {THREE(error)}. 8 bits at: the "
        f"first number to read over {percent(EIGHT_BITS)}, which rounding to 8 bits reads at any batch. 90 % at: the "
        "first to read over 90 %."
    )
    if missing:
        note += f" Cells without it: {missing} ({REMEDY}; experts and previews of some columns have none)."
    heads = ["model", "task", "method", *map(str, sizes), "8 bits at", "90 % at"]
    shown = [j for j in range(len(heads)) if j > 1 or len({row[j] for row in body}) > 1]
    return Table(TITLES[kind], [heads[j] for j in shown], [[row[j] for j in shown] for row in body], note)


def _chart(kind: str, task: str, cells: Sequence[Cell], looks: Mapping[str, int]) -> Chart:
    own = [*dict.fromkeys(label for label, *_ in cells)]
    lines, sizes = [], sorted({n for *_, reads in cells for n in reads})
    for label, _, reads in cells:
        short = label if len(label) <= LONGEST - 5 else f"{label[: LONGEST - 6]}\u2026"
        points, name = [], f"{short} {percent(reads[1][0])}"
        for n, (read, error) in reads.items():
            value, half = 100 * read, 196 * error
            text = f"{name}, {n} {kind}: {percent(read)}"
            points.append(Point(reads[1][0], value, value - half, value + half, text, math.log2(n)))
        lines.append(Line(label, points, looks.get(label, len(looks) + own.index(label)), name))
    ticks = [(math.log2(n), str(n)) for n in sizes]
    span = -0.2, ticks[-1][0] + 0.2
    return Chart(TITLES[kind], f"{task}, % of the FFN bytes", lines, span, ticks, axis=AXES[kind])
