"""The device that a model runs on, by its name."""

from __future__ import annotations

import torch

from dart_eval.util.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "auto, cpu, cuda, cuda:1, mps") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count or (device.type == "mps" and not torch.backends.mps.is_available()):
        beside = f" (CUDA devices: {count})" if device.type == "cuda" else ""
        raise UserError(f"device {name} is not there{beside}", "choose another --device")
    return device
