"""The inputs of a cell, each described once with its role, from which keys, pairing, labels, columns and docs follow.

A field is `asked` (part of the question that a cell answers), `how` (how it was computed, which may move digits), or
`provenance` (code and versions).
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, TypeVar

from pydantic import Field
from typing_extensions import Required, TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.util.text import Json, bits_text

if TYPE_CHECKING:
    from dart_eval.results.frame import Cell
    from dart_eval.results.record import Record

ASKED, HOW, PROVENANCE = "asked", "how", "provenance"
DENSE = "dense"  # the method that leaves the model as it is
NOISE = "noise"  # the method that shows how far from dense rounding errors lie
PRUNING = ("method", "params", "sparsity", "ffn_bits")  # inputs in which a pruned cell and its dense one differ
UNLIKE_DENSE = (*PRUNING, "scope")  # the same with the scope, which does not matter to a dense cell
CALIBRATED = ("calibration", "calibration_tokens", "calibration_seed")  # by these a method has other masks
CODE = ("code", "method_code")  # which differ between versions, and between methods
PLACE = ("task", "sparsity", "scope", "ffn_bits")  # with the model: of a row of tables
HASH_DIGITS, LONGEST = 8, 40  # characters of a hash and of a setting's value in a label
Labelled: TypeAlias = "Record | Cell"
Share = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")
K = TypeVar("K")


class Role(NamedTuple):
    """The role of a field of a cell's inputs, and a sentence for the docs."""

    role: str
    help: str
    column: bool = False  # of `tables --format json` and csv
    named: bool = False  # labels show it, if cells differ in it
    any: bool = False  # None matches any value, since it cannot move this cell's numbers
    hashed: bool = False  # labels show its first digits


def _setting(help: str) -> Role:
    return Role(ASKED, help, column=True, named=True)


def _how(help: str, column: bool = False, any: bool = False, hashed: bool = False) -> Role:
    return Role(HOW, help, column, True, any, hashed)


class Model(TypedDict, total=False):
    """Which model a cell was run on."""

    name: Required[str]
    revision: str | None
    weights: str | None
    remote_code: bool
    loaded: bool


class CellInputs(TypedDict, total=False):
    """All that can change a number. Fields that older versions did not write may be missing."""

    model: Required[Annotated[Model, Role(ASKED, "name, revision, hash; whether its own code ran, or it was `loaded`")]]
    method: Required[Annotated[str, Role(ASKED, "the method's name")]]
    params: Required[Annotated[Json, Role(ASKED, "its options by the paths that a user types, what it is made of")]]
    sparsity: Required[Annotated[Share, Role(ASKED, "share of FFN weight bytes that a decoded token is not to read")]]
    ffn_bits: Annotated[str, Role(ASKED, "bits that FFN weights were rounded to first, where they were", column=True)]
    task: Required[Annotated[str, Role(ASKED, "the lm-eval task or group")]]
    scope: Required[Annotated[str, Role(ASKED, "positions that ran pruned; of dense always `scored`", named=True)]]
    execution: Annotated[str, _how("how pruning was computed; `run` says `masked`")]
    dtype: Annotated[str, _how("what the weights were loaded as", column=True)]
    device: Annotated[str, _how("type of device", column=True)]
    num_fewshot: Annotated[int | None, _setting("examples before each item; null: the task's own number")]
    limit: Annotated[float | None, _setting("first items of each task, or a share below 1; null: all")]
    seed: Annotated[int, _setting("of few-shot sampling and of methods that draw")]
    max_length: Annotated[int | None, _setting("tokens of context and answer; null: the model's")]
    chunk: Annotated[int, _setting("tokens per perplexity chunk")]
    chat_template: Annotated[bool, _setting("prompts were wrapped in the model's chat template")]
    cue: Annotated[str | None, _setting("what replaced the summarisation tasks' own cue")]
    system_instruction: Annotated[str, _setting("what stood before every prompt, where it was given")]
    fewshot_as_multiturn: Annotated[bool, _setting("examples were turns of the chat template, where that was said")]
    enable_thinking: Annotated[bool, _setting("whether the chat template let the model think, where given")]
    think_end_token: Annotated[str, _setting("only the answer after this token was scored, where given")]
    tokenizer: Annotated[str, _setting("the tokenizer, where it was not the model's own")]
    attn_implementation: Annotated[str, _how("the code of attention, where it was given", any=True)]
    add_bos_token: Annotated[bool, _setting("whether prompts began with the BOS token, where given")]
    gen_kwargs: Annotated[str, _setting("generation settings that override the task's own, where given")]
    batch_size: Annotated[int | str | None, _how("contexts per forward, if it can move numbers", column=True, any=True)]
    share_prefix: Annotated[bool | None, _how("common prefixes ran once, if it can move any", column=True, any=True)]
    calibration: Annotated[str | None, _how("hash of the calibration text, where it is read", any=True, hashed=True)]
    calibration_tokens: Annotated[int, _how("tokens of it that were read, where not all", any=True)]
    calibration_seed: Annotated[int, _how("seed by which their passages were drawn", any=True)]
    task_hash: Annotated[str, Role(PROVENANCE, "hash of the task's configuration and documents")]
    code: Annotated[str, Role(PROVENANCE, "digest of the code that all cells share", named=True, hashed=True)]
    method_code: Annotated[Any, Role(PROVENANCE, "digest of the method's own code", named=True, hashed=True)]
    method_files: Annotated[list[Any], Role(PROVENANCE, "hashes of files that the method reads")]
    versions: Annotated[dict[str, str | None] | None, Role(PROVENANCE, "of the libraries underneath")]


def notes(type_: type, kind: type[T]) -> dict[str, T]:
    """Return the fields of a type that are annotated with something of a kind, and that."""
    found: dict[str, T] = {}
    for name, hint in typing.get_type_hints(type_, include_extras=True).items():
        if typing.get_origin(hint) is Required:
            (hint,) = typing.get_args(hint)
        found.update((name, note) for note in getattr(hint, "__metadata__", ()) if isinstance(note, kind))
    return found


FIELDS = notes(CellInputs, Role)
COLUMNS = [name for name, field in FIELDS.items() if field.column]
NAMED = [name for name, field in FIELDS.items() if field.named]
WILDCARDS = {name for name, field in FIELDS.items() if field.any}


# Fields of parts that only some versions have, at the values that do what the others do: a cell of theirs answers the
# same question.
LEGACY_DEFAULTS = {
    "entries": "all", "draw": "best", "choice": "none", "choice.mask_ratio": 1.6, "choice.threshold": "none",
    "compensation": "none", "compensation.over": "calibration", "entries.second": "columns", "score.of": "gate-up",
    "routing": "own", "remask.release": 0, "remask.old": "prompt", "remask.reference": "moved", "remask.every": 0,
    "remask.every_blend": 0.8, "score.average": "l2", "score.decay": 0.98, "score.skip_first": False,
    "score.vocabulary": "none", "score.down_norm": False,
}  # fmt: skip


def names(role: str) -> list[str]:
    """Return the fields of a role, in their order."""
    return [name for name, field in FIELDS.items() if field.role == role]


def asked(inputs: Json, without: Collection[str] = ()) -> Json:
    """Return the `asked` inputs of a cell, without some. A field that older cells lack counts as null."""
    found = {name: inputs.get(name) for name in names(ASKED) if name not in without}
    if model := found.get("model"):
        fields = ["name", "revision", "weights", *(["remote_code"] if model.get("remote_code") else [])]
        found["model"] = {field: model.get(field) for field in fields}
    if found.get("params"):
        found["params"] = without_legacy_defaults(inputs["params"])
    return found


def without_legacy_defaults(params: Json) -> Json:
    """Drop fields that older records lack and whose value equals their implied default."""
    return {k: v for k, v in params.items() if LEGACY_DEFAULTS.get(k) != v}


def matters(name: str, inputs: Json) -> bool:
    """Whether a field can change a cell's numbers: the scope cannot change dense ones."""
    return name != "scope" or inputs["method"] != DENSE


def identity(inputs: Json, without: Collection[str] = ()) -> str:
    """Return `asked` as sortable text: cells with equal text answer the same question."""
    return json.dumps(asked(inputs, without), sort_keys=True)


def question(inputs: Json, without: Collection[str] = UNLIKE_DENSE) -> str:
    """Return the `asked` inputs without the pruning, with dtype and device.

    Cells that agree in it, a dense one and pruned ones, can be compared.
    """
    how = {name: inputs.get(name) for name in ("dtype", "device")}
    return json.dumps([asked(inputs, without), how], sort_keys=True)


def model_of(model: Json) -> str:
    """Return a model's unique name: `NAME@` and the first digits of its weights' hash or its commit."""
    which = model.get("weights") or model.get("revision")
    return f"{model['name']}@{which[:HASH_DIGITS]}" if which else str(model["name"])


# -- labels ------------------------------------------------------------------------------------------------------------


def specs(records: Iterable[Labelled]) -> dict[str, str]:
    """Return key -> the method as typed, with the differing parameters if that is ambiguous."""
    found: dict[str, str] = {}
    for method, cells in grouped(records, lambda r: r.inputs["method"]).items():
        # Of several spellings of one setting the longest: one version's default may be another's parameter.
        typed = {
            params: max((str(r.settings.get("method") or method) for r in alike), key=lambda text: (len(text), text))
            for params, alike in grouped(cells, _params).items()
        }
        settings = {_params(r): LEGACY_DEFAULTS | r.inputs["params"] for r in cells}
        for r in cells:
            found[r.key], own = typed[_params(r)], settings[_params(r)]
            if len(set(typed.values())) < len(typed):
                differ = sorted(k for k in own if any(params.get(k) != own[k] for params in settings.values()))
                found[r.key] = ":".join([method, *(f"{k}={_plain(own[k])}" for k in differ)])
    return found


def labels(records: Sequence[Labelled]) -> dict[str, str]:
    """Return a label per key: the method, the bits of its weights, and the settings in which cells of a task differ."""
    groups = list(grouped(records, lambda r: r.inputs["task"]).values())
    late = {*CODE, *CALIBRATED}
    apart = {s for s in NAMED if s not in late and any(len(values_of(s, group)) > 1 for group in groups)}
    models = {(r.inputs["model"]["name"], json.dumps(r.inputs["model"], sort_keys=True)) for r in records}
    same_name = len(models) > len({name for name, _ in models})
    typed, names, details = specs(records), dict[str, str](), dict[str, list[str]]()
    for (method, bits), alike in grouped(records, lambda r: (typed[r.key], r.inputs.get("ffn_bits"))).items():
        texts = {s for s in CALIBRATED if len(values_of(s, alike)) > 1}  # other methods and codes may have other texts
        shown = [s for s in NAMED if s in apart | texts]
        for r in alike:
            model = r.inputs["model"]
            details[r.key] = [f"model={str(model.get('weights') or model.get('revision'))[:8]}"] if same_name else []
            for name in shown:
                if matters(name, r.inputs) and (name not in WILDCARDS or r.inputs.get(name) is not None):
                    details[r.key].append(_setting_text(name, r))
            names[r.key] = method + (f" on {bits_text(bits)}" if bits else "")
    for alike in grouped(records, lambda r: (names[r.key], *details[r.key])).values():
        # Only the code may distinguish two cells of one place.
        places = {json.dumps([r.inputs.get(name) for name in PLACE] + [r.inputs["model"]["name"]]) for r in alike}
        for name in CODE:
            if len(alike) > len(places) and len(values_of(name, alike)) > 1:
                for r in alike:
                    details[r.key].append(_setting_text(name, r))
    return {key: f"{name} ({' '.join(details[key])})" if details[key] else name for key, name in names.items()}


def values_of(setting: str, cells: Iterable[Labelled]) -> list[str]:
    """Return the values of a setting in these cells, as text, without those that match any."""
    found = {json.dumps(c.inputs.get(setting)) for c in cells if matters(setting, c.inputs)}
    return sorted(found - {"null"} if setting in WILDCARDS else found)


def grouped(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by their key, in the order of its first one."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


def _params(record: Labelled) -> str:
    return json.dumps(LEGACY_DEFAULTS | record.inputs["params"], sort_keys=True)


def _setting_text(setting: str, record: Labelled) -> str:
    text = _plain(record.inputs.get(setting))[: HASH_DIGITS if FIELDS[setting].hashed else None]
    if len(text) > LONGEST:  # what sets two texts apart may stand in what is cut off
        text = f"{text[:LONGEST]}~{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:4]}"
    return f"{setting}={text}"


def _plain(value: object) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)
