"""Measured speeds beside the results of a run: `FOLDER/bench/decode-*.json`.

There is one file per method, sparsity, model, dtype, device, mode of compilation and length of the prompt. A repeated
measurement replaces it. Reading the files needs neither torch nor a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from dart_eval.results import layout
from dart_eval.results.inputs import Model, Share, without_legacy_defaults
from dart_eval.results.ratio import Ratio
from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import check_name, check_target, read_regular, reason, write
from dart_eval.util.text import Json, json_text

SCHEMA = 1
FOLDER = "bench"  # below the folder of results
REMEDY = "choose another --output"
# Fields that identify a measurement; a later one with equal fields replaces the earlier.
OF = ("model", "dtype", "device", "hardware", "compiled", "prompt_tokens", "params", "sparsity")
GIVEN = ("ffn_bits",)  # of `OF` as well, where it is given


@dataclass(frozen=True)
class Speed:
    """The decoding speed of one method on one model.

    Attributes:
        method: the user's spelling, `dart:remask=never`.
        params: every part of the method and every field, as in the inputs of a cell.
        sparsity: share of the FFN weights that a token does not read; 0 if the method has none.
        model: its name, revision and hash of weights, as in the inputs of a cell.
        dtype: of the weights, `bfloat16`.
        device: its type, `cpu` or `cuda`.
        hardware: the GPU's name, or the number of threads.
        compiled: mode of `torch.compile`, or None.
        prompt_tokens: length of the prompts.
        read: share of the FFN weights that a decoded token reads.
        speedup: dense step / pruned step; None if no kernel saves time.
        control: dense step / dense step, whose difference from 1 is noise. None as above.
        ceiling: the largest speed-up that the bytes of this model allow.
        created: UTC, ISO 8601.
        more: all other measurements, by the names of `decode.DecodeSpeed`.
        environment: versions.
        ffn_bits: rounding of the FFN weights, or None.
        times: `bytes only` without times.
    """

    method: str
    params: Json
    sparsity: Share
    model: Annotated[Json, layout.Holds(Model)]
    dtype: str
    device: str
    hardware: str
    compiled: str | None
    prompt_tokens: int
    read: layout.Number
    speedup: Ratio | None
    control: Ratio | None
    ceiling: layout.Number
    created: str
    more: Json = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    ffn_bits: str | None = None
    times: str = "measured"

    def is_of(self, inputs: Json) -> bool:
        """Whether this is the speed of a cell's method at its sparsity, on its model in its dtype.

        Quality does not depend on the device that a speed is measured on, so the device may be another.

        Args:
            inputs: of the cell, as in its record.
        """
        same = all(getattr(self, name) == inputs.get(name) for name in ("dtype", "sparsity", "ffn_bits"))
        of = _which(self.model), without_legacy_defaults(self.params)
        return same and of == (_which(inputs["model"]), without_legacy_defaults(inputs["params"]))

    @property
    def key(self) -> str:
        """sha256 over the fields in `OF` and `GIVEN`."""
        given = {name: value for name in GIVEN if (value := getattr(self, name)) is not None}
        asked = {name: getattr(self, name) for name in OF} | given
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class _Schema(TypedDict):
    """The schema of a file."""

    schema: Literal[1]


_SCHEMA, _SPEED = TypeAdapter(_Schema), TypeAdapter(Speed)


def of_cell(speeds: Sequence[Speed], inputs: Json) -> Speed | None:
    """Return the last measured speed of a cell's method, else its byte counts, else None.

    Args:
        speeds: oldest first.
        inputs: of the cell, as in its record.
    """
    own = [speed for speed in reversed(speeds) if speed.is_of(inputs)]
    return next((speed for speed in own if speed.speedup is not None), own[0] if own else None)


def unlike(speeds: Iterable[Speed | None]) -> list[str]:
    """Return a remark if measured speeds are of several machines or compilers."""
    where = {
        f"{s.device}, {s.hardware}" + (f", torch.compile ({s.compiled})" if s.compiled else "")
        for s in speeds if s is not None and s.speedup is not None
    }  # fmt: skip
    said = f"Speeds of different machines or compilers do not compare: {'; '.join(sorted(where))}."
    return [said] if len(where) > 1 else []


def _which(model: Json) -> tuple[object, ...]:
    """Return the identity of a model: the hash of its weights, or else its name and revision."""
    weights = model.get("weights")
    which = (weights,) if weights else (model["name"], model.get("revision"))
    return (*which, bool(model.get("remote_code")))


def path_of(folder: str | Path, speed: Speed) -> Path:
    """Return the path of a speed's file; its name is for readers, the key decides."""
    name = re.sub(r"[^\w.-]", "_", speed.method.partition(":")[0])
    if speed.ffn_bits is not None:
        name += f"-{speed.ffn_bits.replace(':', '-')}bit"
    return Path(folder) / FOLDER / f"decode-{name}-{speed.sparsity:g}-{speed.key[:16]}.json"


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be written, before anything is measured.

    Raises:
        UserError: with the reason.
    """
    check_name(folder, "--output")
    check_target(Path(folder) / FOLDER / "decode.json", REMEDY)


def keep(folder: str | Path, speed: Speed) -> Path:
    """Write a speed, completely or not at all. Return its path.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(folder, speed)
    data = {"schema": SCHEMA, **dataclasses.asdict(speed)}
    write(path, json_text(data, sort_keys=True) + "\n", REMEDY)
    return path


def load_speeds(folder: str | Path) -> list[Speed]:
    """Return all speeds in a folder of results, oldest first.

    An unreadable file is named on stderr and left out.
    """
    found = []
    for path in sorted((Path(folder) / FOLDER).glob("decode-*.json")):
        try:
            text = read_regular(path)
            layout.read(text, _SCHEMA, "file")
            found.append(layout.read(text, _SPEED, "speed"))
        except (OSError, ValueError) as error:
            problem = UserError(f"{path} cannot be read ({reason(error)})", "measure it again, or remove the file")
            remark(f"left out: {problem}")
    return sorted(found, key=lambda speed: (speed.created, speed.key))
