"""Measured speeds, kept beside the results of a run: `FOLDER/bench/decode-*.json`.

There is one file for a method at a sparsity, on one model in one dtype, on one device, compiled or not, after a prompt
of one length. Measuring the same again replaces it. Neither torch nor a model is needed to read the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_eval.bench.ratio import Ratio
from dart_eval.errors import UserError, remark
from dart_eval.files import check_name, check_target, read_regular, reason, write
from dart_eval.results import valid
from dart_eval.text import json_text

SCHEMA = 1
FOLDER = "bench"  # below the folder of results
REMEDY = "choose another --output"
# What a measurement is of. Two that agree in it are the same one, and the later takes the place of the earlier.
OF = ("model", "dtype", "device", "hardware", "compiled", "prompt_tokens", "params", "sparsity")
RATIOS = ("speedup", "control")


@dataclass(frozen=True)
class Speed:
    """How fast one method decodes on one model.

    Attributes:
        method: as a user types it, `griffin:remask=drift`.
        params: every part of the method and every field, as in the inputs of a cell.
        sparsity: share of the FFN weights that a token does not read; 0 where the method has none.
        model: its name, revision and hash of weights, as in the inputs of a cell.
        dtype: of the weights, `bfloat16`.
        device: its type, `cpu` or `cuda`.
        hardware: the GPU's name, or the number of threads.
        compiled: mode of `torch.compile`; None where nothing was compiled.
        prompt_tokens: length of the prompts, which the decoded tokens attend to.
        read: share of the FFN weights that a decoded token reads.
        speedup: dense step / pruned step.
        control: dense step / dense step; what is told apart from 1 here is noise.
        ceiling: the largest speed-up that the bytes of this model allow.
        created: UTC, ISO 8601.
        more: all else that was measured, by the names of `decode.DecodeSpeed`.
        environment: versions.
    """

    method: str
    params: Mapping[str, Any]
    sparsity: float
    model: Mapping[str, Any]
    dtype: str
    device: str
    hardware: str
    compiled: str | None
    prompt_tokens: int
    read: float
    speedup: Ratio
    control: Ratio
    ceiling: float
    created: str
    more: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def is_of(self, inputs: Mapping[str, Any]) -> bool:
        """Whether this is the speed of a cell's method at its sparsity, on its model in its dtype.

        Quality does not depend on the device that a speed is measured on, so the device may be another.

        Args:
            inputs: of the cell, as in its record.
        """
        same = all(getattr(self, name) == inputs.get(name) for name in ("dtype", "params", "sparsity"))
        return same and _which(self.model) == _which(inputs["model"])

    @property
    def key(self) -> str:
        """sha256 over what was measured, without what came out."""
        asked = {name: getattr(self, name) for name in OF}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _which(model: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a model from others: the hash of its weights, or else its name and revision."""
    weights = model.get("weights")
    which = (weights,) if weights else (model["name"], model.get("revision"))
    return (*which, bool(model.get("remote_code")))


def path_of(folder: str | Path, speed: Speed) -> Path:
    """Where a speed is kept; its name is for people, the key decides."""
    name = re.sub(r"[^\w.-]", "_", speed.method.partition(":")[0])
    return Path(folder) / FOLDER / f"decode-{name}-{speed.sparsity:g}-{speed.key[:16]}.json"


def check(folder: str | Path) -> None:
    """Refuse a folder in which nothing could be kept, before anything is measured.

    Raises:
        UserError: with the reason.
    """
    check_name(folder, "--output")
    check_target(Path(folder) / FOLDER / "decode.json", REMEDY)


def keep(folder: str | Path, speed: Speed) -> Path:
    """Write a speed; the file is there whole, or not at all. Returns its path.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(folder, speed)
    data = {"schema": SCHEMA, **dataclasses.asdict(speed)}
    write(path, json_text(data, sort_keys=True) + "\n", REMEDY)
    return path


def read(folder: str | Path) -> list[Speed]:
    """All speeds that are kept in a folder of results, oldest first; none where nothing was measured.

    A file that cannot be read is named on stderr and left out.
    """
    found = []
    for path in sorted((Path(folder) / FOLDER).glob("decode-*.json")):
        try:
            found.append(_speed(valid.parsed(read_regular(path))))
        except (OSError, ValueError) as error:
            said = UserError(f"{path} cannot be read ({reason(error)})", "measure it again, or remove the file")
            remark(f"left out: {said}")
    return sorted(found, key=lambda speed: (speed.created, speed.key))


_ratio = valid.fields({"median": valid.number, "low": valid.number, "high": valid.number, "n": valid.count})
_file = valid.fields({
    "method": valid.text, "params": valid.mapping, "sparsity": valid.share,
    "model": valid.fields({"name": valid.text}, {"revision": valid.text_or_none, "weights": valid.text_or_none}),
    "dtype": valid.text, "device": valid.text, "hardware": valid.text, "compiled": valid.text_or_none,
    "prompt_tokens": valid.count, "read": valid.number, "speedup": _ratio, "control": _ratio, "ceiling": valid.number,
    "created": valid.text, "more": valid.mapping, "environment": valid.values(valid.text),
})  # fmt: skip


def _speed(data: Any) -> Speed:
    """The speed in a file.

    Raises:
        ValueError: there is none in it, or a newer version wrote it.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema {schema} is not known")
    _file(data, "speed")
    ratios = {name: Ratio(**{f.name: data[name][f.name] for f in dataclasses.fields(Ratio)}) for name in RATIOS}
    return Speed(**{f.name: data[f.name] for f in dataclasses.fields(Speed)} | ratios)
