"""The record of one finished cell: what was asked, what came out, and with what. docs/records.md shows one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Metric:
    """One number with its uncertainty.

    Attributes:
        task: lm-eval task or group that the number belongs to.
        metric: its name, e.g. `acc`, `acc_norm`, `rougeL`, `word_perplexity`.
        value: mean over samples, or exp of a mean for perplexities.
        stderr: standard error of `value`, or None where the metric has none.
        n: samples.
        higher_is_better: direction.
        part_of: the group this task is a member of, or None for what the user asked for.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    part_of: str | None = None


@dataclass(frozen=True)
class Record:
    """One cell.

    Attributes:
        key: sha256 over `inputs`; two cells with the same key have the same numbers.
        inputs: all that can change a number (made by `plan.plan`).
        metrics: the results.
        mask_sparsity: what the masks in force pruned, mean over tokens that ran pruned.
        effective_sparsity: pruned neuron-tokens / all neuron-tokens of the scored or generated tokens.
        weights_read: FFN weights a pruned token multiplies / all FFN weights.
        tokens: scored or generated tokens.
        remasks: masks renewed after an alarm.
        by_task: `tokens`, `remasks`, `mask_sparsity`, `effective_sparsity` of each lm-eval task of the cell.
        flops: see `cost.describe`.
        memory: bytes of `weights`, `state` (method, per sequence), `peak` (process or GPU, while the cell ran).
        settings: what cannot change a number, e.g. batch size.
        environment: versions and machine.
        seconds: wall time of the cell.
        created: UTC time, ISO 8601.
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
    seconds: float
    created: str
    schema: int = SCHEMA
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)  # in a file of their own, see `store`

    def to_json(self) -> dict[str, Any]:
        """Plain data, samples left out."""
        data = dataclasses.asdict(dataclasses.replace(self, samples=[]))
        del data["samples"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that `to_json` wrote.

        Raises:
            ValueError: written by a newer version, or not a record.
        """
        if not isinstance(data, dict):
            raise ValueError("not a record")
        version = data.get("schema")
        if not isinstance(version, int) or version > SCHEMA:
            raise ValueError(f"record schema {version} is not known here (this version reads up to {SCHEMA})")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            metrics = [Metric(**m) for m in data["metrics"]]
            return cls(**{k: v for k, v in data.items() if k in known and k != "metrics"}, metrics=metrics)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a record ({error})") from None
