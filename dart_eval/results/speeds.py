"""Measured speeds beside the results of a run: `FOLDER/bench/decode-*.json`.

There is one file per method, sparsity, model, dtype, device, bits and length of the prompt. A repeated measurement
replaces it. Reading the files needs neither torch nor a model.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import TypeAdapter

from dart_eval.results.inputs import Model, Share, without_legacy_defaults
from dart_eval.results.record import holds, read
from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import read_regular, reason, write
from dart_eval.util.text import Json, json_text

FOLDER = "bench"  # below the folder of results
REMEDY = "choose another --output"
# Fields that identify a measurement, `ffn_bits` where it is given; a later one with equal fields replaces the earlier.
OF = ("model", "dtype", "device", "hardware", "compiled", "prompt_tokens", "params", "sparsity")


@dataclass(frozen=True)
class Ratio:
    """The ratio of times that were taken in turn: median of paired ratios with its quartiles, over n pairs."""

    median: float
    low: float
    high: float
    n: int


def paired(above: list[float], below: list[float], offset: float = 0.0) -> Ratio:
    """Return the ratio above / below - offset, pair by pair."""
    ratios = sorted(a / b - offset for a, b in zip(above, below, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(median, max(low, ratios[0]), min(high, ratios[-1]), len(ratios))  # of two they lie beyond both


@dataclass(frozen=True)
class Speed:
    """What boards read of a speed's file: the decoding speed of one method on one model.

    Attributes:
        params, sparsity, model, dtype, ffn_bits: as in the inputs of a cell; sparsity 0 if the method has none.
        hardware: the GPU's name, or the number of threads.
        compiled: mode of `torch.compile`, which older versions timed, or None.
        speedup: dense step / pruned step; None if no kernel saves time.
        created: UTC, ISO 8601.
    """

    params: Json
    sparsity: Share
    model: Annotated[Json, holds(Model)]
    dtype: str
    device: str
    hardware: str
    compiled: str | None
    speedup: Ratio | None
    created: str
    ffn_bits: str | None = None
    schema: Literal[1] = 1


_SPEED = TypeAdapter(Speed)


def of_cell(speeds: Sequence[Speed], inputs: Json) -> Speed | None:
    """Return the last measured speed of a cell's method, else its byte counts, else None.

    Quality does not depend on the device that a speed is measured on, so the device may be another.

    Args:
        speeds: oldest first.
        inputs: of the cell, as in its record.
    """
    own = [speed for speed in reversed(speeds) if _timed(vars(speed)) == _timed(inputs)]
    return next((speed for speed in own if speed.speedup is not None), own[0] if own else None)


def _timed(inputs: Json) -> list[object]:
    """Return what was timed: a method at its sparsity, on a model (by the hash of its weights) in its dtype."""
    model = inputs["model"]
    which = model.get("weights") or [model["name"], model.get("revision")]
    params = without_legacy_defaults(inputs["params"])
    return [params, inputs["sparsity"], which, bool(model.get("remote_code")), inputs["dtype"], inputs.get("ffn_bits")]


def unlike(speeds: Iterable[Speed | None]) -> list[str]:
    """Return a remark if measured speeds are of several machines or compilers."""
    timed = [speed for speed in speeds if speed is not None and speed.speedup is not None]
    how = [f", torch.compile ({speed.compiled})" if speed.compiled else "" for speed in timed]
    where = {f"{speed.device}, {speed.hardware}{text}" for speed, text in zip(timed, how, strict=True)}
    said = f"Speeds of different machines or compilers do not compare: {'; '.join(sorted(where))}."
    return [said] if len(where) > 1 else []


def keep(folder: str | Path, speed: Json) -> Path:
    """Write a speed, completely or not at all. Return its path: the name is for readers, the key decides.

    Args:
        speed: the fields in `OF` and of `Speed`, and whatever else was measured.

    Raises:
        UserError: it cannot be written.
    """
    bits = speed["ffn_bits"]
    of = {name: speed[name] for name in OF} | ({} if bits is None else {"ffn_bits": bits})
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", speed["method"].partition(":")[0])
    rounded = "" if bits is None else f"-{bits.replace(':', '-')}bit"
    path = Path(folder) / FOLDER / f"decode-{name}{rounded}-{speed['sparsity']:g}-{key}.json"
    write(path, json_text({"schema": 1, **speed}, sort_keys=True) + "\n", REMEDY)
    return path


def load_speeds(folder: str | Path) -> list[Speed]:
    """Return all speeds in a folder of results, oldest first.

    An unreadable file is named on stderr and left out.
    """
    speeds = []
    for path in sorted((Path(folder) / FOLDER).glob("decode-*.json")):
        try:
            speeds.append(read(read_regular(path), _SPEED, "speed"))
        except (OSError, ValueError) as error:
            problem = UserError(f"{path} cannot be read ({reason(error)})", "measure it again, or remove the file")
            remark(f"left out: {problem}")
    return sorted(speeds, key=lambda speed: speed.created)
