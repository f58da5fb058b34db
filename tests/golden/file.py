"""The file of golden numbers: one case a line, and what moved between it and new numbers."""

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("golden.json")

# What is summed in fp32, in an order that processors choose. All other numbers are exact, up to last digits of fp64.
IN_FP32 = {"logits", "logprob", "signal", "threshold", "mean", "deviation"}
FP32, FP64 = 1e-5, 1e-9


def read():
    """Case -> its numbers."""
    return json.loads(FILE.read_text(), object_hook=_decode) if FILE.exists() else {}


def write(cases):
    """Save the numbers of all cases."""
    lines = (f"{json.dumps(name)}: {json.dumps(_plain(numbers))}" for name, numbers in cases.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _plain(value, name=None):
    """Data for JSON: arrays encoded, floats with as many digits as are compared."""
    if isinstance(value, dict):
        return {key: _plain(part, key) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, name) for part in value]
    if isinstance(value, np.ndarray):
        return _encode(value)
    return float(f"{value:.{8 if name in IN_FP32 else 11}g}") if isinstance(value, float) else value


def _encode(array):
    if array.dtype == bool:
        return {"bits": np.packbits(array).tobytes().hex(), "count": len(array)}
    return {"fp32": base64.b64encode(array.astype("<f4").tobytes()).decode(), "shape": array.shape}


def _decode(found):
    if "bits" in found:
        bits = np.frombuffer(bytes.fromhex(found["bits"]), np.uint8)
        return np.unpackbits(bits, count=found["count"]).astype(bool)
    if "fp32" in found:
        return np.frombuffer(base64.b64decode(found["fp32"]), "<f4").reshape(found["shape"])
    return found


@dataclass
class Moved:
    """How many of a field's numbers are others than before, and by how much at most; infinite for what is no number."""

    count: int = 0
    total: int = 0
    most: float = 0.0

    def __str__(self):
        by = f", by up to {self.most:.2g}" if math.isfinite(self.most) else ""
        return f"{self.count} of {self.total} moved{by}"


def moved(before, now):
    """Field -> what moved of it, for fields in which something did. `copied` must equal the first of `sequences`."""
    if "copied" in now:
        before = {**before, "copied": before["sequences"][: len(now["copied"])]}
    fields = {}
    _compare(before, now, (), fields)
    return {field: found for field, found in fields.items() if found.count}


def told(fields):
    """What moved, a line for each field."""
    return "\n".join(f"  {field}: {found}" for field, found in fields.items())


def _compare(before, now, path, fields):
    """Count what moved at a path. The entries of a list are one field."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            _compare(before.get(key), now.get(key), (*path, key), fields)
    elif isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            _compare(old, new, path, fields)
    else:
        field = fields.setdefault(", ".join(path), Moved())
        for difference, size in _differences(before, now):
            field.total += 1
            if not difference <= (FP32 if path[-1] in IN_FP32 else FP64 * max(1, size)):  # NaN too
                field.count += 1
                field.most = max(field.most, difference)


def _differences(before, now):
    """For each number of a value by how much it differs, and its size before; infinity for what is another thing."""
    if isinstance(before, np.ndarray) and isinstance(now, np.ndarray) and before.shape == now.shape:
        old, new = before.astype(float).ravel(), now.astype(float).ravel()
    elif isinstance(before, (bool, int, float)) and isinstance(now, (bool, int, float)):
        old, new = np.array([before], float), np.array([now], float)
    else:
        same = type(before) is type(now) and not isinstance(before, (np.ndarray, dict)) and before == now
        return [(0.0 if same else math.inf, 0.0)]
    return zip(np.abs(old - new).tolist(), np.abs(old).tolist(), strict=True)
