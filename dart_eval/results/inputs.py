"""The inputs of a cell, each described once with its role, from which keys, pairing, labels, columns and docs follow.

A field is `asked` (part of the question that a cell answers), `how` (how it was computed, which may move digits), or
`provenance` (code and versions).
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, with_config
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results.layout import OPEN, Number
from dart_eval.util.text import Json

ASKED, HOW, PROVENANCE = "asked", "how", "provenance"
DENSE = "dense"  # the method that leaves the model as it is
PRUNING = ("method", "params", "sparsity", "ffn_bits")  # inputs in which a pruned cell and its dense one differ
UNLIKE_DENSE = (*PRUNING, "scope")  # the same with the scope, which does not matter to a dense cell
CALIBRATED = ("calibration", "calibration_tokens", "calibration_seed")  # by these a method has other masks
HASH_DIGITS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Role:
    """The role of a field of a cell's inputs.

    Attributes:
        role: `asked`, `how` or `provenance`.
        help: one sentence for the docs.
        column: whether it is a column of `tables --format json` and csv.
        named: whether labels show it if cells differ in it.
        any: whether None matches any value, since it cannot move this cell's numbers.
        hashed: whether it is a hash, of which labels show the first digits.
    """

    role: str
    help: str
    column: bool = False
    named: bool = False
    any: bool = False
    hashed: bool = False


def _asked(help: str, setting: bool = True) -> Role:
    return Role(ASKED, help, column=setting, named=setting)


@with_config(OPEN)
class Model(TypedDict):
    """Which model a cell was run on."""

    name: str
    revision: NotRequired[str | None]
    weights: NotRequired[str | None]
    remote_code: NotRequired[bool]
    loaded: NotRequired[bool]


Share = Annotated[Number, Field(ge=0, le=1)]


@with_config(OPEN)
class CellInputs(TypedDict):
    """All that can change a number. Fields that older versions did not write may be missing."""

    model: Annotated[
        Model, _asked("name, revision, hash of the weights, whether code of its own ran or it came `loaded`", False)
    ]
    method: Annotated[str, _asked("the method's name", False)]
    params: Annotated[Json, _asked("its options by the paths that a user types, and what it is made of", False)]
    sparsity: Annotated[Share, _asked("share of FFN weight bytes that a decoded token is not to read", False)]
    ffn_bits: NotRequired[
        Annotated[str, Role(ASKED, "bits that FFN weights were rounded to first, where they were", column=True)]
    ]
    task: Annotated[str, _asked("the lm-eval task or group", False)]
    scope: Annotated[
        str, Role(ASKED, "which positions ran pruned when answers were scored; of dense always `scored`", named=True)
    ]
    execution: NotRequired[Annotated[str, Role(HOW, "how pruning was computed; `run` says `masked`", named=True)]]
    dtype: NotRequired[Annotated[str, Role(HOW, "what the weights were loaded as", True, True)]]
    device: NotRequired[Annotated[str, Role(HOW, "type of device", True, True)]]
    num_fewshot: NotRequired[Annotated[int | None, _asked("examples before each item; null: the task's own number")]]
    limit: NotRequired[Annotated[Number | None, _asked("first items of each task, or a share below 1; null: all")]]
    seed: NotRequired[Annotated[int, _asked("of few-shot sampling and of methods that draw")]]
    max_length: NotRequired[Annotated[int | None, _asked("tokens of context and answer; null: the model's")]]
    chunk: NotRequired[Annotated[int, _asked("tokens per perplexity chunk")]]
    chat_template: NotRequired[Annotated[bool, _asked("prompts were wrapped in the model's chat template")]]
    cue: NotRequired[Annotated[str | None, _asked("what replaced the summarisation tasks' own cue")]]
    system_instruction: NotRequired[Annotated[str, _asked("what stood before every prompt, where it was given")]]
    fewshot_as_multiturn: NotRequired[
        Annotated[bool, _asked("examples were turns of the chat template, where that was said")]
    ]
    enable_thinking: NotRequired[Annotated[bool, _asked("whether the chat template let the model think, where given")]]
    think_end_token: NotRequired[Annotated[str, _asked("only the answer after this token was scored, where given")]]
    tokenizer: NotRequired[Annotated[str, _asked("the tokenizer, where it was not the model's own")]]
    attn_implementation: NotRequired[
        Annotated[str, Role(HOW, "the code of attention, where it was given", named=True, any=True)]
    ]
    add_bos_token: NotRequired[Annotated[bool, _asked("whether prompts began with the BOS token, where given")]]
    gen_kwargs: NotRequired[Annotated[str, _asked("generation settings that override the task's own, where given")]]
    batch_size: NotRequired[
        Annotated[int | str | None, Role(HOW, "contexts per forward, where it can move a number", True, True, any=True)]
    ]
    share_prefix: NotRequired[
        Annotated[bool | None, Role(HOW, "common prefixes ran once, where it can move a number", True, True, any=True)]
    ]
    calibration: NotRequired[
        Annotated[
            str | None,
            Role(HOW, "hash of the calibration text, where the method reads it", named=True, any=True, hashed=True),
        ]
    ]
    calibration_tokens: NotRequired[
        Annotated[int, Role(HOW, "tokens of it that were read at most, where not all", named=True, any=True)]
    ]
    calibration_seed: NotRequired[
        Annotated[int, Role(HOW, "seed by which their passages were drawn", named=True, any=True)]
    ]
    task_hash: NotRequired[Annotated[str, Role(PROVENANCE, "hash of the task's configuration and documents")]]
    code: NotRequired[
        Annotated[str, Role(PROVENANCE, "digest of the code that all cells share", named=True, hashed=True)]
    ]
    method_code: NotRequired[
        Annotated[Any, Role(PROVENANCE, "digest of the method's own code", named=True, hashed=True)]
    ]
    method_files: NotRequired[Annotated[list[Any], Role(PROVENANCE, "hashes of files that the method reads")]]
    versions: NotRequired[Annotated[dict[str, str | None] | None, Role(PROVENANCE, "of the libraries underneath")]]


def notes(type_: type, kind: type[T]) -> dict[str, T]:
    """Return the fields of a type that are annotated with something of a kind, and that."""
    found: dict[str, T] = {}
    for name, hint in typing.get_type_hints(type_, include_extras=True).items():
        while typing.get_origin(hint) is NotRequired:
            (hint,) = typing.get_args(hint)
        found.update((name, note) for note in getattr(hint, "__metadata__", ()) if isinstance(note, kind))
    return found


FIELDS = notes(CellInputs, Role)


def names(role: str) -> list[str]:
    """Return the fields of a role, in their order."""
    return [name for name, field in FIELDS.items() if field.role == role]


COLUMNS = [name for name, field in FIELDS.items() if field.column]
NAMED = [name for name, field in FIELDS.items() if field.named]


# Fields of parts that only some versions have, at the values that do what the others do: a cell of theirs answers the
# same question.
UNSAID = {
    "entries": "all", "draw": "best", "choice": "none", "choice.mask_ratio": 1.6, "choice.threshold": "none",
    "compensation": "none", "compensation.over": "calibration", "entries.second": "columns", "score.of": "gate-up",
    "routing": "own", "remask.release": 0, "remask.old": "prompt", "remask.reference": "moved", "remask.every": 0,
    "remask.every_blend": 0.8, "score.average": "l2", "score.decay": 0.98, "score.skip_first": False,
    "score.vocabulary": "none", "score.down_norm": False,
}  # fmt: skip


def asked(inputs: Json, without: Iterable[str] = ()) -> Json:
    """Return the `asked` inputs of a cell, without some. A field that older cells lack counts as null."""
    left_out = set(without)
    found = {name: inputs.get(name) for name in names(ASKED) if name not in left_out}
    if "model" in found:
        model = inputs["model"]
        fields = ["name", "revision", "weights", *(["remote_code"] if model.get("remote_code") else [])]
        found["model"] = {k: model.get(k) for k in fields}
    if found.get("params"):
        found["params"] = without_legacy_defaults(inputs["params"])
    return found


def without_legacy_defaults(params: Json) -> Json:
    """Drop fields that older records lack and whose value equals their implied default."""
    return {k: v for k, v in params.items() if UNSAID.get(k) != v}


def matters(name: str, inputs: Json) -> bool:
    """Whether a field can change a cell's numbers: the scope cannot change dense ones."""
    return name != "scope" or inputs["method"] != DENSE


def identity(inputs: Json, without: Iterable[str] = ()) -> str:
    """Return `asked` as sortable text: cells with equal text answer the same question."""
    return json.dumps(asked(inputs, without), sort_keys=True)


def question(inputs: Json, without: Iterable[str] = UNLIKE_DENSE) -> str:
    """Return the `asked` inputs without the pruning, with dtype and device.

    Cells that agree in it, a dense one and pruned ones, can be compared.
    """
    how = {name: inputs.get(name) for name in ("dtype", "device")}
    return json.dumps([asked(inputs, without), how], sort_keys=True)


def model_of(model: Json) -> str:
    """Return a model's unique name: `NAME@` and the first digits of its weights' hash or its commit."""
    which = model.get("weights") or model.get("revision")
    return f"{model['name']}@{which[:HASH_DIGITS]}" if which else str(model["name"])
