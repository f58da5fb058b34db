"""What a sweep will take, from a short pilot: a few units of every task, timed on the machine that would run it.

A task's units are planned exactly as in a run. Three units of each kind of request run dense: the first, which is the
largest and shows the memory, and two others. The rest is assumed to take as long per token. What a method adds to a
kind of request is measured once, on the first task that has it, at the first sparsity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.evaluation.shard import Call, Pilot
from dart_eval.models.loading import resolve
from dart_eval.pruning.registry import make
from dart_eval.results import layout
from dart_eval.results.journal import Journal
from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.sweep.config import RunConfig
from dart_eval.sweep.jobs import Job, View, plan_all
from dart_eval.util.errors import UserError, naming, out_of_memory, summary
from dart_eval.util.files import read_regular, write_atomically
from dart_eval.util.machine import peak_memory

if TYPE_CHECKING:
    from dart_eval.sweep.worker import Worker

FILE = "plan.json"


class _Planned(TypedDict):
    """A cell in a plan."""

    title: str
    seconds: layout.Number


class _Plan(TypedDict):
    """A plan: its cells by their keys."""

    cells: dict[str, _Planned]


_PLAN = TypeAdapter(_Plan)


@dataclass(frozen=True)
class CellSize:
    """What a cell is expected to take.

    Attributes:
        requests: distinct ones. tokens: to compute, new ones at their most. flops: products with the decoder's weights,
            and with the output head once a request (masks save none of them).
        memory: bytes, the pilot's peak: of the GPU, or of the process, with what the method takes more. seconds: on one
            worker. cache: bytes of keys and values of the batch that holds the most, in the memory already.
        finished: there is a record already.
    """

    key: str
    name: str
    title: str
    requests: int
    tokens: int
    flops: float
    memory: int
    seconds: float
    finished: bool
    cache: int = 0


@dataclass(frozen=True)
class _Timed:
    """A pilot: its calls, seconds beside their units (prompts, tokenisation, metrics), peak bytes."""

    calls: list[Call]
    beside: float
    memory: int


def estimate(configs: Sequence[RunConfig], view: View, device: str | None = None) -> list[CellSize]:
    """Return the size of every cell, in the order of the plan.

    Args:
        device: its type, if another machine planned.

    Raises:
        UserError: the input is wrong.
    """
    from dart_eval.evaluation.forwards import Forwards, output_head  # with transformers' models it takes seconds
    from dart_eval.sweep.worker import Worker

    jobs, _ = plan_all(configs, view, False, device)
    store = Store(configs[0].output)
    worker = Worker(configs[0], resolve(configs[0].model_spec), view.status, note=view.note)
    dense: dict[tuple[str, RunConfig], _Timed] = {}
    factors: dict[tuple[str, str], float] = {}  # (method, kind) -> time over dense
    more: dict[str, int] = {}  # method -> bytes over dense, at most
    kept = Forwards(worker.model, output_head(worker.model)).bytes_of_a_token()
    per_token = 2 * (worker.shape.ffn_weights + worker.shape.other_weights)
    found = []
    for job in jobs.values():
        cell = job.cell
        task = (cell.task, job.config)
        if task not in dense:
            view.status(f"trying {cell.task}")
            plain = dataclasses.replace(cell, method=make("dense", {}), sparsity=0.0)
            plain_job = dataclasses.replace(job, cell=plain)
            dense[task] = _pilot(worker, plain_job, _ending(worker, plain_job))
        base, method = dense[task], cell.method.spec
        if cell.method.prunes and any((method, c.kind) not in factors for c in base.calls):
            view.status(f"trying {cell.title}")
            tried = _pilot(worker, job)
            more[method] = max(more.get(method, 0), tried.memory - base.memory)
            for before, after in zip(base.calls, tried.calls, strict=True):
                factors.setdefault((method, before.kind), sum(after.seconds.values()) / sum(before.seconds.values()))
        seconds = base.beside + sum(_extrapolated(c) * factors.get((method, c.kind), 1.0) for c in base.calls)
        tokens, requests = sum(c.tokens for c in base.calls), sum(c.requests for c in base.calls)
        flops = tokens * per_token + requests * 2 * worker.shape.head_weights
        finished = store.get(cell.name, cell.key) is not None and not job.config.force
        memory, cached = base.memory + more.get(method, 0), round(kept * max((c.cached for c in base.calls), default=0))
        found.append(CellSize(
            cell.key, cell.name, cell.title, requests, tokens, flops, memory, seconds, finished, cached
        ))  # fmt: skip
    return found


@contextlib.contextmanager
def _trying(job: Job) -> Iterator[None]:
    """Name the cell in errors of the block, which would fail it in a run."""
    try:
        with naming(f"{job.cell.title}: "):
            yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        remedy = "leave it out: a run would fail it alone, and keep the traceback"
        raise UserError(f"{job.cell.title} cannot be tried ({summary(error)})", remedy) from error


def _ending(worker: Worker, job: Job) -> float:
    """Return the seconds of a one-document cell beside its answer: a pilot lacks them, as it makes no metrics."""
    start = time.monotonic()
    with _trying(job):
        worker.run(dataclasses.replace(job, config=dataclasses.replace(job.config, limit=1)), Journal())
    return time.monotonic() - start - sum(s for call in worker.lm.calls for s in call.seconds.values())


def _pilot(worker: Worker, job: Job, ending: float = 0.0) -> _Timed:
    start = time.monotonic()
    with peak_memory(worker.lm.device.type) as peak, _trying(job):
        worker.answer(job, Journal(), Pilot())
        memory = peak()
    calls = worker.lm.calls
    spent = sum(s for call in calls for s in call.seconds.values())
    return _Timed(calls, time.monotonic() - start - spent + ending, memory)


def _extrapolated(call: Call) -> float:
    """Return the seconds of all units: the first as measured, the others by their sizes."""
    rest = {place: seconds for place, seconds in call.seconds.items() if place}
    first = call.seconds.get(0, 0.0)
    if not rest:
        return first
    return first + sum(call.sizes[1:]) * sum(rest.values()) / sum(call.sizes[place] for place in rest)


def keep(folder: str | Path, sizes: Sequence[CellSize], workers: int) -> None:
    """Write the plan into the folder of results, where the run compares itself with it."""
    cells = {s.key: {"title": s.title, "seconds": s.seconds} for s in sizes if not s.finished}
    text = json.dumps({"workers": workers, "cells": cells}, indent=1, sort_keys=True) + "\n"
    write_atomically(Path(folder) / FILE, text)


def held_against(folder: str | Path, records: Sequence[Record]) -> str | None:
    """Return how far off the plan of this folder was, in one line; None without a plan of these records."""
    try:
        planned = layout.read(read_regular(Path(folder) / FILE), _PLAN)["cells"]
    except (OSError, ValueError):
        return None
    pairs = [
        (planned[r.key]["title"], float(planned[r.key]["seconds"]), r.seconds) for r in records if r.key in planned
    ]
    if not pairs:
        return None
    expected, took = sum(p for _, p, _ in pairs), sum(s for _, _, s in pairs)
    text = f"planned {duration(expected)} of work for {len(pairs)} cells, took {duration(took)}"
    text += f" ({100 * (took / expected - 1):+.0f} %)" if expected else ""
    title, p, s = max(pairs, key=lambda pair: abs(pair[2] - pair[1]))
    return f"{text}; furthest off: {title}, {duration(s)} instead of {duration(p)}"


def duration(seconds: float) -> str:
    """Return a time for people: `40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
