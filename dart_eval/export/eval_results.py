"""The hub's `.eval_results/*.yaml`: a number of a model's repository that a benchmark's leaderboard shows.

The format has a value and a line of notes. What made the value stands in the notes, as `name=value; name=value`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial

import yaml

from dart_eval.export.datasets import Dataset, of_task
from dart_eval.export.facts import Facts
from dart_eval.export.writing import NO_PLACE, LeftOut, Piece
from dart_eval.results.metrics import main
from dart_eval.results.record import Metric
from dart_eval.util.files import safe

LAST = "parameters"  # the longest: what a reader wants first stands before it


def pieces(cells: Sequence[Facts], datasets: Mapping[str, Dataset], source: str | None) -> list[Piece]:
    """Return a folder a model, as in its repository, with a file a number: a leaderboard reads one a file.

    Args:
        cells: the exported cells.
        datasets: data sets of lm-eval tasks.
        source: a page with more about the results, or None.
    """
    found = []
    nowhere: set[str] = set()  # tasks without a data set
    for cell in cells:
        metrics = main(m for m in cell.record.metrics if m.part_of is None)
        if not metrics:
            why = f"{cell.task} under {cell.title} has no number that is better one way"
            found.append(Piece((), partial(_left_out, why, NO_PLACE)))
        for metric in metrics:
            dataset = of_task(metric.task, cell.leaves(), datasets)
            if dataset is None:
                nowhere.add(metric.task)
                continue
            name = safe(f"{metric.task}-{cell.named('-')}") + f"-{cell.record.key[:8]}"
            path = f"{safe(cell.model)}/.eval_results/{name}.yaml"
            found.append(Piece((path,), partial(_file, path, cell, metric, dataset, source)))
    if tasks := sorted(nowhere):
        why = f"{', '.join(tasks)}: no data set on the hub is known, and this format needs one"
        name = f"name it for each: --dataset {tasks[0]}=OWNER/NAME"
        remedy = f"{name}; `--to lm-eval` and `--to every-eval-ever` need none"
        found.append(Piece((), partial(_left_out, why, remedy)))
    return found


def _file(path: str, cell: Facts, metric: Metric, dataset: Dataset, source: str | None) -> dict[str, str]:
    if not math.isfinite(metric.value):
        raise LeftOut(f"{metric.metric} of {metric.task} under {cell.title} is {metric.value}", "run the cell again")
    cell.store.samples(cell.record)  # raises on answers that are no numbers
    moment = cell.moment
    entry = {
        "dataset": {"id": dataset.id, "task_id": dataset.task},
        "value": metric.value,
        **({"date": moment.isoformat().replace("+00:00", "Z")} if moment else {}),
        **({"source": {"url": source}} if source else {}),
        "notes": _notes(cell, metric),
    }
    return {path: yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000)}


def _left_out(why: str, remedy: str) -> dict[str, str]:
    raise LeftOut(why, remedy)


def _notes(cell: Facts, metric: Metric) -> str:
    details = cell.details()
    notes = {
        "pruner": details.pop("pruner"), "sparsity": details.pop("sparsity"), "read": details.pop("read"),
        "metric": metric.metric, "stderr": metric.stderr, "n": metric.n, **details,
        "dart-eval": cell.record.environment.get("dart-eval"),
    }  # fmt: skip
    notes[LAST] = notes.pop(LAST)
    return "; ".join(f"{name}={_text(value)}" for name, value in notes.items() if value is not None)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
