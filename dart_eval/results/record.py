"""The files of a results folder: the record of a finished cell, its samples, and the texts that it was asked.

Data is read as one of these types, or refused in one line: a digest shows that a file was cut or changed, not that its
data are valid, since other programs write records too. `scripts/records_page.py` makes the tables of docs/records.md.
Fields that have a default, or are not `Required`, may be missing in older files. Unnamed fields are not checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import NotRequired, Required, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results.inputs import CellInputs, Labelled
from dart_eval.results.metrics import asked, kind_of
from dart_eval.util.text import Json

SCHEMA = 2
OPEN, CLOSED = ConfigDict(extra="allow"), ConfigDict(extra="forbid")
T = TypeVar("T")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[^/\\]*[^./\\][^/\\]*$")]


def holds(type_: Any) -> AfterValidator:
    """Return a check of plain JSON, which must have a type and stays as it was written."""
    adapter = TypeAdapter(type_)

    def check(data: T) -> T:
        adapter.validate_python(data, strict=True)
        return data

    return AfterValidator(check)


def read(text: str | bytes, type_: TypeAdapter[T], where: str = "") -> T:
    """Read JSON as data of a type.

    Args:
        where: name of the data in messages.

    Raises:
        ValueError: describes the first error, in one line.
    """
    try:
        return type_.validate_json(text, strict=True)
    except ValidationError as error:  # nested too deeply, or no Unicode, too
        first = error.errors(include_url=False)[0]
        place = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


# -- samples and texts -------------------------------------------------------------------------------------------------


class Drift(TypedDict, total=False):
    """What the drift detector saw of one document."""

    signal: Required[Annotated[list[float | None], "cosine per window"]]
    window: Required[Annotated[int, "tokens of a window"]]
    threshold: Annotated[float | None, "below it a window is drift"]
    mean: Annotated[float, "of the prompt's windows"]
    deviation: Annotated[float, "of the prompt's windows"]
    alarms: Annotated[list[float], "decoded tokens before each"]
    remasks: Annotated[list[float], "decoded tokens before each"]


class Sample(TypedDict, total=False):
    """One document of a cell, under one filter."""

    task: Required[Annotated[str, "the lm-eval task"]]
    doc_id: Required[Annotated[int, "the document's number in it"]]
    filter: Required[Annotated[str, "lm-eval's filter of the answer; `none` where there is none"]]
    doc_hash: Required[Annotated[str, "sha256 of the document, which paired comparisons join on"]]
    prompt_hash: Required[Annotated[str, "sha256 of the prompt, likewise"]]
    target_hash: Required[Annotated[str, "sha256 of the right answer"]]
    cluster: Annotated[str | None, "a name that documents of one passage or article share, or null"]
    metrics: Required[Annotated[Json, "the document's values: below"]]
    responses: Required[Annotated[list[Any], "log-likelihood and greedy flag of each candidate, or the text"]]
    written: Annotated[list[str], "the texts as they were written, where a filter has made `responses` of them"]
    token_ids: Annotated[list[int], "the tokens of the text (the first one), with those that ended it"]
    limited: Annotated[bool, "whether it has all the tokens that it may have"]
    texts: Annotated[int, "the texts that were drawn, where there are several: `tokens` are of all"]
    kl_bins: Annotated[dict[str, int], "i -> positions whose KL is in the bin that ends at 2^(i/8) nats; -160: below"]
    tokens: Annotated[float, "scored or generated tokens"]
    remasks: Annotated[float, "re-masks meanwhile"]
    effective_sparsity: Annotated[float, "share of the FFN weights that these tokens did not read"]
    drift: Annotated[Drift | None, "what the detector saw, where it closed a window: below"]


class Document(TypedDict, total=False):
    """A prompt and its answers, once for all cells that were asked the same."""

    task: Required[Annotated[str, "the lm-eval task"]]
    doc_id: Required[Annotated[int, "the document's number in it"]]
    prompt: Annotated[str | None, "what the model read"]
    choices: Annotated[list[str] | None, "the candidates, or null"]
    target: Annotated[Any, "the index of the right choice, or the reference"]


# -- records -----------------------------------------------------------------------------------------------------------


class NewerSchema(ValueError):
    """A record of a layout that only a newer version of this program knows."""


class Settings(TypedDict, total=False):
    """How a cell was run, where that cannot change a number."""

    method: Annotated[str, "as typed: its name, and the settings that differ from that method's own"]
    command: Annotated[str, "the line that makes this one cell; of a loaded model a line of Python"]
    upper_bound: Annotated[bool, "the method uses information that is available only afterwards"]
    granularity: Annotated[str, "what is left out, if not neurons: input channels, bits"]
    about: Annotated[bool, "reads are about right: the weights' bits are those of the configuration alone"]
    halved: Annotated[int, "how often memory ran out and batches were halved, where it did"]
    calibration: Annotated[str, "the calibration text, for people, where one was read"]
    kl: Annotated[bool, "false where no distance from dense was measured beside scored answers"]
    notes: Annotated[list[str], "on the model's checkpoint, where there are any"]


class Measured(TypedDict):
    """What differs between two equal runs: seconds of wall time, when it was finished, and bytes at most."""

    seconds: float
    created: str
    peak: NotRequired[float]


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
    value: Annotated[float, "mean over documents, or exp of a mean for perplexities"]
    stderr: Annotated[float | None, "standard error of `value`; null where the metric has none"]
    n: Annotated[int, "documents"]
    higher_is_better: Annotated[bool | None, "direction; null where neither is better"]
    part_of: Annotated[str | None, "the group that this task is a member of; null for what was asked for"] = None
    filter: Annotated[str, "lm-eval's filter of the answers; `none` where there is none"] = "none"
    aggregation: Annotated[str | None, "how it follows from documents (below); null: in no such way"] = Field(
        default_factory=lambda fields: kind_of(fields["metric"]).kind
    )
    weights: Annotated[Literal["documents", "tasks"], "of a group: each of these weighs the same"] = "documents"

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
    inputs: Annotated[Json, holds(CellInputs), "all that can change a number: below"]
    metrics: Annotated[list[Metric], "the results: below"]
    mask_sparsity: Annotated[float, "share of the neurons outside the mask, mean over the tokens that ran pruned"]
    effective_sparsity: Annotated[float, "share of the FFN weights that its tokens did not read, dense ones too"]
    weights_read: Annotated[float, "share of the FFN weights that a pruned token reads"]
    tokens: Annotated[int, "scored or generated tokens"]
    remasks: Annotated[int, "new masks that were made while tokens were decoded"]
    flops: Annotated[dict[str, int | float], "at the mean context: below"]
    memory: Annotated[dict[str, int], holds(dict[str, float]), "bytes: below"]
    settings: Annotated[Json, holds(Settings), "how the cell was run: below"]
    environment: Annotated[dict[str, str], "versions, the kind of machine, and its `gpu` or its `threads`"]
    measured: Annotated[Json, holds(Measured), "what differs between two equal runs: `seconds`, `created`, `peak`"]
    schema: int = SCHEMA
    by_task: Annotated[dict[str, dict[str, int | Finite]], "of each lm-eval task: below"] = Field(default_factory=dict)
    files: Annotated[dict[str, Json], holds(dict[str, File]), "its other files: below"] = Field(default_factory=dict)
    cut: Annotated[int | None, "documents whose prompt was cut to the context, over all tasks"] = None
    fetched: Annotated[float | None, "`weights_read` in whole lines of 64 bytes; null: unknown"] = None
    samples: list[Json] = Field(default_factory=list, repr=False)

    @property
    def created(self) -> str:
        """When the cell was finished: UTC, ISO 8601."""
        return str(self.measured["created"])

    def to_json(self) -> Json:
        """Plain data with a digest over it, samples left out."""
        data = dataclasses.asdict(dataclasses.replace(self, samples=[]))
        del data["samples"]
        return {**data, "digest": _digest(data)}

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Read the text of a record that `to_json` made.

        Raises:
            NewerSchema: written by a newer version.
            ValueError: changed since it was written, or not a record.
        """
        data = read(text, _OBJECT, "record")
        schema, digest = data.get("schema"), data.pop("digest", None)
        if schema != SCHEMA:
            newer = type(schema) is int and schema > SCHEMA
            problem = f"record schema {schema} is not known here: this version reads {SCHEMA}"
            raise NewerSchema(problem) if newer else ValueError(problem)
        if digest != _digest(data):
            raise ValueError("its digest does not fit" if digest else "not a record ('digest')")
        return read(text, _RECORD, "record")


_OBJECT, _RECORD = TypeAdapter(Json), TypeAdapter(Record)


def described(cell: Labelled) -> str:
    """Name a cell in a message."""
    method = cell.settings.get("method") or cell.inputs["method"]
    return f"{cell.inputs['task']} under {method} at {asked(cell.inputs['sparsity'])}"


def _digest(data: Json) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
