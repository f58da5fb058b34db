"""The record of one finished cell: what was asked, what came out, and with what. docs/records.md shows one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dart_eval.results import layout

SCHEMA = 2
# Names in `flops` that older versions wrote, and what they are called now.
RENAMED = {
    "tracing_prefill": "overhead_prefill", "tracing_decode_step": "overhead_decode_step",
    "tracing_share": "overhead_share", "renewals_read": "remask_reads",
}  # fmt: skip


class NewerSchema(ValueError):
    """A record of a layout that only a newer version of this program knows."""


@dataclass(frozen=True)
class Metric:
    """One number with its uncertainty.

    Attributes:
        task: lm-eval task or group that the number belongs to.
        metric: its name, e.g. `acc`, `acc_norm`, `rougeL`, `word_perplexity`.
        value: mean over samples, or exp of a mean for perplexities.
        stderr: standard error of `value`, or None where the metric has none.
        n: samples.
        higher_is_better: direction; None where neither is better, e.g. the length of a summary.
        part_of: the group this task is a member of, or None for what the user asked for.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    part_of: str | None = None


@dataclass(frozen=True)
class Record:
    """One cell.

    Attributes:
        key: sha256 over `inputs`; two cells with the same key have the same numbers.
        inputs: all that can change a number (made by `plan.plan`).
        metrics: the results.
        mask_sparsity: neurons outside the masks in force, mean over tokens that ran pruned.
        effective_sparsity: share of the FFN weights that the scored or generated tokens did not read; dense ones count.
        weights_read: share of the FFN weights that a pruned token reads.
        tokens: scored or generated tokens.
        remasks: new masks that were made while tokens were decoded.
        by_task: of each lm-eval task of the cell `tokens`, `remasks`, `mask_sparsity`, `effective_sparsity`; and its
            `documents`, how many of their prompts were `cut`, to fit with the answer into `length` tokens (older
            records lack these three).
        cut: documents whose prompt was cut, of all its tasks; None in older records, which did not count them.
        flops: see `cost.describe`.
        memory: bytes of `weights` and `state` (method, per sequence).
        settings: what cannot change a number: `batch_size`, `share_prefix`, `method` as typed, and `command`, the line
            that makes this one cell; `halved`: how often memory ran out and batches were halved, where it did; `notes`
            on the model's checkpoint, where there are any.
        environment: versions and machine: its GPUs' names, or threads.
        measured: what differs between two equal runs: `seconds` (wall time of the cell, interrupted attempts
            included), `created` (UTC, ISO 8601), `peak` (bytes: of the GPU, or of the process, while the cell ran).
        files: the cell's other files, each with `name`, `n` (lines) and `sha256`: `samples`, `texts`.
        schema: version of this layout.
    """

    key: str
    inputs: dict[str, Any]
    metrics: list[Metric]
    mask_sparsity: float
    effective_sparsity: float
    weights_read: float
    tokens: int
    remasks: int
    flops: dict[str, Any]
    memory: dict[str, int]
    settings: dict[str, Any]
    environment: dict[str, str]
    measured: dict[str, Any]
    schema: int = SCHEMA
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: int | None = None
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)  # in a file of their own, see `store`

    @property
    def created(self) -> str:
        """When the cell was finished: UTC, ISO 8601."""
        return str(self.measured["created"])

    @property
    def seconds(self) -> float:
        """Wall time of the cell."""
        return float(self.measured["seconds"])

    def to_json(self) -> dict[str, Any]:
        """Plain data with a digest over it, samples left out."""
        data = dataclasses.asdict(dataclasses.replace(self, samples=[]))
        del data["samples"]
        return {**data, "digest": _digest(data)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that `to_json` wrote, of this version or an older one.

        Raises:
            NewerSchema: written by a newer version.
            ValueError: changed since it was written, or not a record.
        """
        if not isinstance(data, dict):
            raise ValueError("not a record")
        schema = data.get("schema")
        if type(schema) is not int or schema < 1:
            raise ValueError(f"record schema {schema} is not known")
        if schema > SCHEMA:
            raise NewerSchema(f"record schema {schema} is not known here: this version reads 1 to {SCHEMA}")
        data = dict(data)
        if schema == 1:
            data = _from_schema_1(data)
        elif (digest := data.pop("digest", None)) != _digest(data):
            raise ValueError("its digest does not fit" if digest else "not a record ('digest')")
        try:
            layout.check(layout.record, data, "record")
        except ValueError as error:
            raise ValueError(f"not a record ({error})") from None
        data["flops"] = {RENAMED.get(name, name): value for name, value in data["flops"].items()}
        known = {f.name for f in dataclasses.fields(cls)} - {"samples"}
        known_of_metric = {f.name for f in dataclasses.fields(Metric)}
        metrics = [Metric(**{k: v for k, v in m.items() if k in known_of_metric}) for m in data["metrics"]]
        return cls(**{k: v for k, v in data.items() if k in known and k != "metrics"}, metrics=metrics)


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 kept times and the peak among the rest, and said nothing of the cell's other files."""
    try:
        memory = dict(data["memory"])
        measured = {"seconds": data["seconds"], "created": data["created"], "peak": memory.pop("peak")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a record ({error})") from None
    return {**data, "memory": memory, "measured": measured, "schema": SCHEMA}
