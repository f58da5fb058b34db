"""The types of the files in a results folder: data is read as one of these, or refused in one line.

A digest shows that a file was cut or changed, not that its data are valid: other programs write records too. The record
itself is in `record`, its inputs in `inputs`; the tables of docs/records.md are made from all three
(`scripts/records_page.py`). Fields that are `NotRequired`, or have a default, may be missing in older files. Unnamed
fields are not checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, WrapValidator, with_config
from pydantic_core import CoreSchema
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

OPEN, CLOSED = ConfigDict(extra="allow"), ConfigDict(extra="forbid")
LARGEST = 2**63  # beyond it a whole number has no float
LONG = re.compile(rb"[\s:,[-]\d{19}")  # as many digits as it has
T = TypeVar("T")


def _as_written(value: T, check: Callable[[T], float]) -> T:
    check(value)
    return value


@dataclass(frozen=True)
class Holds:
    """The type that a field must have when it is read, beside the plain type that code uses."""

    type: object

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.type)


Number = Annotated[float, WrapValidator(_as_written)]  # a whole number stays one
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^(\.?[^./\\\x00]|\.\.[^/\\\x00])[^/\\\x00]*$")]


@with_config(OPEN)
class Drift(TypedDict):
    """What the drift detector saw of one document."""

    signal: Annotated[list[Number | None], "cosine per window"]
    window: Annotated[int, "tokens of a window"]
    threshold: NotRequired[Annotated[Number | None, "below it a window is drift"]]
    mean: NotRequired[Annotated[Number, "of the prompt's windows"]]
    deviation: NotRequired[Annotated[Number, "of the prompt's windows"]]
    alarms: NotRequired[Annotated[list[Number], "decoded tokens before each"]]
    remasks: NotRequired[Annotated[list[Number], "decoded tokens before each"]]


@with_config(OPEN)
class Sample(TypedDict):
    """One document of a cell, under one filter."""

    task: Annotated[str, "the lm-eval task"]
    doc_id: Annotated[int, "the document's number in it"]
    filter: Annotated[str, "lm-eval's filter of the answer; `none` where there is none"]
    doc_hash: Annotated[str, "sha256 of the document, which paired comparisons join on"]
    prompt_hash: Annotated[str, "sha256 of the prompt, likewise"]
    target_hash: Annotated[str, "sha256 of the right answer"]
    cluster: NotRequired[Annotated[str | None, "a name that documents of one passage or article share, or null"]]
    metrics: Annotated[
        dict[str, Any],
        "numbers; `[log-likelihood, words or bytes]` for perplexities; ten counts for `bleu`; for choice tasks "
        "`gold_ll`, the log-likelihood of the right answer; where answers were scored under a pruner `kl` and `top1`, "
        "sums over the scored positions of all answers, each with the number of positions",
    ]
    responses: Annotated[list[Any], "log-likelihood and greedy flag of each candidate, or the text"]
    written: NotRequired[
        Annotated[list[str], "the texts as they were written, where a filter has made `responses` of them"]
    ]
    token_ids: NotRequired[Annotated[list[int], "the tokens of the text (the first one), with those that ended it"]]
    texts: NotRequired[Annotated[int, "the texts that were drawn, where there are several: `tokens` are of all"]]
    kl_bins: NotRequired[
        Annotated[dict[str, int], "i -> positions whose KL is in the bin that ends at 2^(i/8) nats; -160 has all below"]
    ]
    tokens: NotRequired[Annotated[Number, "scored or generated tokens"]]
    remasks: NotRequired[Annotated[Number, "re-masks meanwhile"]]
    effective_sparsity: NotRequired[Annotated[Number, "share of the FFN weights that these tokens did not read"]]
    drift: NotRequired[Annotated[Drift | None, "what the detector saw, where it closed a window: below"]]


@with_config(OPEN)
class Document(TypedDict):
    """A prompt and its answers, once for all cells that were asked the same."""

    task: Annotated[str, "the lm-eval task"]
    doc_id: Annotated[int, "the document's number in it"]
    prompt: NotRequired[Annotated[str | None, "what the model read"]]
    choices: NotRequired[Annotated[list[str] | None, "the candidates, or null"]]
    target: NotRequired[Annotated[Any, "the index of the right choice, or the reference"]]


ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def read(text: str | bytes, type_: TypeAdapter[T] = ANYTHING, where: str = "") -> T:
    """Read JSON as data of a type, without changes.

    Args:
        where: name of the data in messages.

    Raises:
        ValueError: describes the first error, in one line.
    """
    try:
        found = type_.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        if LONG.search(text if isinstance(text, bytes) else text.encode()):
            _refuse_large([found])
        return found
    if first["type"] == "json_invalid":  # nested too deeply and no Unicode, too
        raise ValueError(first["msg"])
    place = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    if first["type"] == "missing":
        place, _, name = place.rpartition(".")
        raise ValueError(f"{place} lacks {name!r}")
    value = json.dumps(first["input"], default=repr)
    value = value if len(value) <= 40 else f"{value[:37]}..."
    raise ValueError(f"{place} is {value}: {first['msg'].removeprefix('Input ')}")


def _refuse_large(data: Iterable[object]) -> None:
    for item in data.values() if isinstance(data, dict) else data:
        if isinstance(item, int) and abs(item) >= LARGEST:
            raise ValueError(f"a number of {len(str(abs(item)))} digits")
        if isinstance(item, (dict, list, tuple)):
            _refuse_large(item)
