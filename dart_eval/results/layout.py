"""What the files of a results folder hold, as types: they are checked against these where they are read.

The tables of docs/records.md are made from here (`scripts/records_page.py`). What is `NotRequired` may be missing in
records of older versions. Fields that are not named here are kept and not looked at.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results.inputs import CellInputs

OPEN = ConfigDict(extra="allow")
Number = float  # or a whole number
FileName = Annotated[str, Field(pattern=r"^(\.?[^./\\\x00]|\.\.[^/\\\x00])[^/\\\x00]*$")]


class MetricData(TypedDict):
    """One number of a cell."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    task: Annotated[str, "lm-eval task or group that the number belongs to"]
    metric: Annotated[str, "its name, with its filter after a comma where there are several"]
    value: Annotated[Number, "mean over documents, or exp of a mean for perplexities"]
    stderr: Annotated[Number | None, "standard error of `value`; null where the metric has none"]
    n: Annotated[int, "documents"]
    higher_is_better: Annotated[bool | None, "direction; null where neither is better"]
    part_of: NotRequired[Annotated[str | None, "the group that this task is a member of; null for what was asked for"]]


class Settings(TypedDict):
    """How a cell was run, where that cannot change a number."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    method: NotRequired[Annotated[str, "as typed: its name, and what is not as the method of that name has it"]]
    command: NotRequired[Annotated[str, "the line that makes this one cell; of a loaded model a line of Python"]]
    upper_bound: NotRequired[Annotated[bool, "the method knows what none can know in time"]]
    halved: NotRequired[Annotated[int, "how often memory ran out and batches were halved, where it did"]]
    notes: NotRequired[Annotated[list[str], "on the model's checkpoint, where there are any"]]


class Measured(TypedDict):
    """What differs between two equal runs."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    seconds: Annotated[Number, "wall time of the cell, interrupted attempts included"]
    created: Annotated[str, "when it was finished: UTC, ISO 8601"]
    peak: NotRequired[Annotated[Number, "bytes: of the GPU, or of the process, while the cell ran"]]


class TaskCost(TypedDict):
    """What one lm-eval task of a cell took: numbers, of which these are counts."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    documents: NotRequired[Annotated[int, "documents of the task"]]
    cut: NotRequired[Annotated[int, "documents whose prompt was cut"]]
    length: NotRequired[Annotated[int, "tokens that prompt and answer had to fit into"]]


class FileData(TypedDict):
    """Another file of the cell."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    name: Annotated[FileName, "its name in the folder of its kind"]
    n: Annotated[int, "lines"]
    sha256: Annotated[str, "its digest"]


class RecordData(TypedDict):
    """The record of a finished cell."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    key: Annotated[str, "sha256 over `inputs`; equal keys mean equal numbers on the same kind of hardware"]
    inputs: Annotated[CellInputs, "all that can change a number: below"]
    metrics: Annotated[list[MetricData], "the results: below"]
    mask_sparsity: Annotated[Number, "share of the neurons outside the mask, mean over the tokens that ran pruned"]
    effective_sparsity: Annotated[
        Number, "share of the FFN weights that the scored or generated tokens did not read, dense ones included"
    ]
    weights_read: Annotated[Number, "share of the FFN weights that a pruned token reads"]
    tokens: Annotated[int, "scored or generated tokens"]
    remasks: Annotated[int, "new masks that were made while tokens were decoded"]
    by_task: NotRequired[
        Annotated[
            dict[str, TaskCost],
            "of each lm-eval task of the cell: `tokens`, `remasks`, `mask_sparsity`, `effective_sparsity`, "
            "`documents`, how many of their prompts were `cut`, and the tokens (`length`) that prompt and answer had "
            "to fit into",
        ]
    ]
    cut: NotRequired[Annotated[int | None, "documents whose prompt was cut to the context, over all tasks"]]
    flops: Annotated[
        dict[str, Number],
        "at `context_tokens` (the mean context): `prefill`, `decode_step_dense`, `decode_step_pruned`, "
        "`overhead_prefill`, `overhead_decode_step` (re-masks included), `overhead_share` (of a dense step), `remask`, "
        "`remask_reads` (FFN weights that re-masks read per decoded token / all FFN weights), `ffn_share`. Older "
        "records say `tracing_` for `overhead_` and `renewals_read` for `remask_reads`",
    ]
    memory: Annotated[dict[str, Number], "bytes: `weights`, and `state`, which the method keeps for a sequence"]
    settings: Annotated[Settings, "how the cell was run: below"]
    environment: Annotated[dict[str, str], "versions, the kind of machine, and its `gpu` or its `threads`"]
    measured: Annotated[Measured, "what differs between two equal runs: `seconds`, `created`, `peak`"]
    files: NotRequired[Annotated[dict[str, FileData], "`samples` and `texts`: `name`, `n`, `sha256`"]]


class Drift(TypedDict):
    """What the drift detector saw of one document."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    signal: Annotated[list[Number | None], "cosine per window"]
    window: Annotated[int, "tokens of a window"]
    threshold: NotRequired[Annotated[Number | None, "below it a window is drift"]]
    mean: NotRequired[Annotated[Number, "of the prompt's windows"]]
    deviation: NotRequired[Annotated[Number, "of the prompt's windows"]]
    alarms: NotRequired[Annotated[list[Number], "decoded tokens before each"]]
    remasks: NotRequired[Annotated[list[Number], "decoded tokens before each"]]


class SampleData(TypedDict):
    """One document of a cell, under one filter."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    task: Annotated[str, "the lm-eval task"]
    doc_id: Annotated[int, "the document's number in it"]
    filter: Annotated[str, "lm-eval's filter of the answer; `none` where there is none"]
    doc_hash: Annotated[str, "sha256 of the document, which paired comparisons join on"]
    prompt_hash: Annotated[str, "sha256 of the prompt, likewise"]
    target_hash: Annotated[str, "sha256 of the right answer"]
    cluster: NotRequired[Annotated[str | None, "a name that documents of one passage or article share, or null"]]
    metrics: Annotated[
        dict[str, Any],
        "numbers; `[log-likelihood, words or bytes]` for perplexities; ten counts for `bleu`; and for choice tasks "
        "`gold_ll`, the log-likelihood of the right answer",
    ]
    responses: Annotated[list[Any], "log-likelihood and greedy flag of each candidate, or the text"]
    tokens: NotRequired[Annotated[Number, "scored or generated tokens"]]
    remasks: NotRequired[Annotated[Number, "re-masks meanwhile"]]
    effective_sparsity: NotRequired[Annotated[Number, "share of the FFN weights that these tokens did not read"]]
    drift: NotRequired[Annotated[Drift | None, "what the detector saw, where it closed a window: below"]]


class Document(TypedDict):
    """A prompt and its answers, once for all cells that were asked the same."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    task: Annotated[str, "the lm-eval task"]
    doc_id: Annotated[int, "the document's number in it"]
    prompt: NotRequired[Annotated[str | None, "what the model read"]]
    choices: NotRequired[Annotated[Any, "the candidates, or null"]]
    target: NotRequired[Annotated[Any, "the index of the right choice, or the reference"]]


record: TypeAdapter[RecordData] = TypeAdapter(RecordData)
sample: TypeAdapter[SampleData] = TypeAdapter(SampleData)
document: TypeAdapter[Document] = TypeAdapter(Document)
inputs: TypeAdapter[CellInputs] = TypeAdapter(CellInputs)


def check(type_: TypeAdapter[Any], data: Any, where: str) -> None:
    """Refuse data that is not of a type; nothing is changed in it.

    Args:
        where: what it is, for the message.

    Raises:
        ValueError: the first thing that is wrong, in one line.
    """
    try:
        type_.validate_python(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        if first["type"] == "missing":
            place, _, name = place.rpartition(".")
            raise ValueError(f"{place} lacks {name!r}") from None
        said = json.dumps(first["input"], default=repr)
        said = said if len(said) <= 40 else f"{said[:37]}..."
        raise ValueError(f"{place} is {said}: {first['msg'].removeprefix('Input ')}") from None
