"""Cells that differ in their seed alone: the board shows their mean as one row."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from dart_eval.results.frame import Compared
from dart_eval.results.inputs import CALIBRATED, identity
from dart_eval.results.record import Record


def together(records: Sequence[Record]) -> list[list[Record]]:
    """Group records that differ in the seed alone, of the run and of parts that took it; the lowest comes first."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: int(r.inputs.get("seed") or 0)):
        seed = record.inputs.get("seed")
        params = {
            name: None if name.endswith(".seed") and value == seed else value
            for name, value in record.inputs["params"].items()
        }
        how = [record.inputs.get(name) for name in ("dtype", "device", *CALIBRATED)]
        groups.setdefault(f"{identity({**record.inputs, 'seed': None, 'params': params})} {how}", []).append(record)
    return [*groups.values()]


def mean_record(some: Sequence[Record]) -> Record:
    """Return the first record, with the means of all metrics, reads and FLOPs.

    Errors are over documents, for any number of seeds.
    """
    if len(some) == 1:
        return some[0]
    found = {(m.task, m.metric): [m] for m in some[0].metrics}
    for record in some[1:]:
        for m in record.metrics:
            found.get((m.task, m.metric), []).append(m)
    metrics = []
    for same in found.values():
        errors = [m.stderr for m in same if m.stderr is not None]
        value, stderr = statistics.mean(m.value for m in same), statistics.mean(errors) if errors else None
        metrics.append(dataclasses.replace(same[0], value=value, stderr=stderr))
    flops = {n: statistics.mean(float({n: x, **r.flops}[n]) for r in some) for n, x in some[0].flops.items()}
    read = statistics.mean(r.weights_read for r in some)
    return dataclasses.replace(some[0], metrics=metrics, weights_read=read, flops=flops)


def mean_records(groups: Sequence[Sequence[Record]]) -> list[Record]:
    """Return the mean record of each group; where there are means, none is labelled by the seed of one cell."""
    made = [mean_record(some) for some in groups]
    if all(len(some) == 1 for some in groups):
        return made
    return [dataclasses.replace(record, inputs={**record.inputs, "seed": None}) for record in made]


def mean_compared(cells: Sequence[Sequence[Compared]]) -> list[Compared]:
    """Return the metrics of cells beside dense, with each document's mean over the cells.

    Args:
        cells: rows of each; a metric that one of them lacks, or has of other documents, is left out.
    """
    if len(cells) == 1:
        return [*cells[0]]
    made = []
    for first in cells[0]:
        same = [one for rows in cells for one in rows if one.measure == first.measure]
        if len(same) == len(cells) and all(one.pairs.units == first.pairs.units for one in same):
            a, b = (np.mean(sides, axis=0) for sides in zip(*((one.pairs.a, one.pairs.b) for one in same), strict=True))
            made.append(dataclasses.replace(first, pairs=first.pairs._replace(a=a, b=b)))
    return made


def remark(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Return a sentence that names the seeds of means, and how many cells lack some of them, if there are any."""
    seeds = sorted({int(r.inputs.get("seed") or 0) for some in groups if len(some) > 1 for r in some})
    fewer = sum(len(some) < len(seeds) for some in groups)
    but = f"; {fewer} of {len(groups)} cells ran under fewer of them" if fewer else ""
    return [f"Rows are means over the seeds {', '.join(map(str, seeds))}{but}."] if seeds else []
