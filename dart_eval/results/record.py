"""The record of one finished cell: its inputs, results and environment. docs/records.md shows one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results import layout
from dart_eval.results.inputs import CellInputs
from dart_eval.results.layout import OPEN, FileName, Holds, Number
from dart_eval.results.metrics import kind_of
from dart_eval.util.text import Json

SCHEMA = 2


class NewerSchema(ValueError):
    """A record of a layout that only a newer version of this program knows."""


@with_config(OPEN)
class Settings(TypedDict):
    """How a cell was run, where that cannot change a number."""

    method: NotRequired[Annotated[str, "as typed: its name, and the settings that differ from that method's own"]]
    command: NotRequired[Annotated[str, "the line that makes this one cell; of a loaded model a line of Python"]]
    upper_bound: NotRequired[Annotated[bool, "the method uses information that is available only afterwards"]]
    granularity: NotRequired[Annotated[str, "what is left out, if not neurons: input channels, bits"]]
    about: NotRequired[Annotated[bool, "reads are about right: the weights' bits are those of the configuration alone"]]
    halved: NotRequired[Annotated[int, "how often memory ran out and batches were halved, where it did"]]
    kl: NotRequired[Annotated[bool, "false where no distance from dense was measured beside scored answers"]]
    notes: NotRequired[Annotated[list[str], "on the model's checkpoint, where there are any"]]


@with_config(OPEN)
class Measured(TypedDict):
    """What differs between two equal runs."""

    seconds: Annotated[Number, "wall time of the cell, interrupted attempts included"]
    created: Annotated[str, "when it was finished: UTC, ISO 8601"]
    peak: NotRequired[Annotated[Number, "bytes: of the GPU, or of the process, while the cell ran"]]


@with_config(OPEN)
class TaskCost(TypedDict):
    """What one lm-eval task of a cell took: numbers, of which these are counts."""

    documents: NotRequired[int]
    cut: NotRequired[int]
    length: NotRequired[int]


@with_config(OPEN)
class File(TypedDict):
    """Another file of the cell."""

    name: FileName
    n: int
    sha256: str


@dataclass(frozen=True, config=OPEN)
class Metric:
    """One number of a cell, with its uncertainty, and how it follows from documents."""

    task: Annotated[str, "lm-eval task or group that the number belongs to"]
    metric: Annotated[str, "its name"]
    value: Annotated[Number, "mean over documents, or exp of a mean for perplexities"]
    stderr: Annotated[Number | None, "standard error of `value`; null where the metric has none"]
    n: Annotated[int, "documents"]
    higher_is_better: Annotated[bool | None, "direction; null where neither is better"]
    part_of: Annotated[str | None, "the group that this task is a member of; null for what was asked for"] = None
    filter: Annotated[str, "lm-eval's filter of the answers; `none` where there is none"] = "none"
    aggregation: Annotated[
        str | None,
        "how the value follows from documents: `mean`, or as a quotient of sums `ratio`, `log-perplexity` or `bits`; "
        "null: neither. Where older records lack it, it follows from the name",
    ] = Field(default_factory=lambda fields: kind_of(fields["metric"]).kind)
    weights: Annotated[
        Literal["documents", "tasks"], "of a group: whether each document or each member task weighs the same"
    ] = "documents"

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        """Split the `name,filter` of older records."""
        if isinstance(data, dict) and "filter" not in data and isinstance(data.get("metric"), str):
            name, _, filter_ = data["metric"].partition(",")
            data = {**data, "metric": name, "filter": filter_ or "none"}
        return data

    @property
    def label(self) -> str:
        """Its name, with its filter where there are several."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


@dataclass(frozen=True, config=OPEN)
class Record:
    """One cell. Its samples are in a file of their own (`store`)."""

    key: Annotated[str, "sha256 over `inputs`; equal keys mean equal numbers on the same kind of hardware"]
    inputs: Annotated[dict[str, Any], Holds(CellInputs), "all that can change a number: below"]
    metrics: Annotated[list[Metric], "the results: below"]
    mask_sparsity: Annotated[Number, "share of the neurons outside the mask, mean over the tokens that ran pruned"]
    effective_sparsity: Annotated[
        Number, "share of the FFN weights that the scored or generated tokens did not read, dense ones included"
    ]
    weights_read: Annotated[Number, "share of the FFN weights that a pruned token reads"]
    tokens: Annotated[int, "scored or generated tokens"]
    remasks: Annotated[int, "new masks that were made while tokens were decoded"]
    flops: Annotated[
        Json, Holds(dict[str, Number]),
        "at `context_tokens` (the mean context): `prefill`, `decode_step_dense`, `decode_step_pruned`, "
        "`overhead_prefill`, `overhead_decode_step` (re-masks included), `overhead_share` (of a dense step), `remask`, "
        "`remask_reads` (FFN weights that re-masks read per decoded token / those that a dense token reads), "
        "`remask_bytes` (the same in bytes, of the model's own dtype), `ffn_share`",
    ]  # fmt: skip
    memory: Annotated[
        dict[str, int], Holds(dict[str, Number]),
        "bytes: `weights`, `beside` (what lies beside the dense model while one sequence decodes with "
        "execution `auto`, copies and codes of weights included), and `state` (what each further sequence adds)",
    ]  # fmt: skip
    settings: Annotated[Json, Holds(Settings), "how the cell was run: below"]
    environment: Annotated[dict[str, str], "versions, the kind of machine, and its `gpu` or its `threads`"]
    measured: Annotated[Json, Holds(Measured), "what differs between two equal runs: `seconds`, `created`, `peak`"]
    schema: int = SCHEMA
    by_task: Annotated[
        dict[str, dict[str, float]], Holds(dict[str, TaskCost]),
        "of each lm-eval task of the cell: `tokens`, `remasks`, `mask_sparsity`, `effective_sparsity`, "
        "`documents`, how many of their prompts were `cut`, and the limit on prompt and answer together, in "
        "tokens (`length`)",
    ] = Field(default_factory=dict)  # fmt: skip
    files: Annotated[
        dict[str, Json], Holds(dict[str, File]),
        "`samples` and `texts`, each with its `name`, its number of lines `n` and its `sha256`",
    ] = Field(default_factory=dict)  # fmt: skip
    cut: Annotated[int | None, "documents whose prompt was cut to the context, over all tasks"] = None
    samples: list[dict[str, Any]] = Field(default_factory=list, repr=False)

    @property
    def created(self) -> str:
        """When the cell was finished: UTC, ISO 8601."""
        return str(self.measured["created"])

    @property
    def seconds(self) -> float:
        """Wall time of the cell."""
        return float(self.measured["seconds"])

    def to_json(self) -> dict[str, object]:
        """Plain data with a digest over it, samples left out."""
        data = dataclasses.asdict(dataclasses.replace(self, samples=[]))
        del data["samples"]
        return {**data, "digest": _digest(data)}

    @classmethod
    def from_json(cls, data: object) -> Record:
        """Read a record that `to_json` wrote.

        Raises:
            NewerSchema: written by a newer version.
            ValueError: changed since it was written, or not a record.
        """
        if not isinstance(data, dict):
            raise ValueError("not a record")
        schema = data.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise NewerSchema(f"record schema {schema} is not known here: this version reads {SCHEMA}")
        if schema != SCHEMA:
            raise ValueError(f"record schema {schema} is not known")
        data = dict(data)
        if (digest := data.pop("digest", None)) != _digest(data):
            raise ValueError("its digest does not fit" if digest else "not a record ('digest')")
        try:
            return layout.read(json.dumps(data), _RECORD, "record")
        except ValueError as error:
            raise ValueError(f"not a record ({error})") from None


_RECORD = TypeAdapter(Record)


def _digest(data: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
