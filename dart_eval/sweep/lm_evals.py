"""Options as lm-eval calls them, and what they are called here. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dart_eval.sweep import values
from dart_eval.sweep.values import short_repr
from dart_eval.util.errors import UserError, nearest

# What lm-eval calls otherwise: options, its `--model_args`, and its names for the models of transformers.
LM_EVALS = {"apply_chat_template": "chat_template", "output_path": "output"}
MODEL_ARGS = {
    "pretrained": "model", "revision": "revision", "dtype": "dtype", "trust_remote_code": "trust_remote_code",
    "max_length": "max_length", "device": "device", "device_map": "device_map", "peft": "peft",
    "enable_thinking": "enable_thinking", "think_end_token": "think_end_token",
}  # fmt: skip
OF_OTHER_TYPES = ("trust_remote_code", "max_length", "enable_thinking")  # than text
BACKENDS = ("hf", "hf-auto", "huggingface")


def translate(told: dict[str, Any]) -> None:
    """Replace what lm-eval calls otherwise.

    Raises:
        UserError: it has no counterpart here, or both are given.
    """
    found = {ours: told.pop(theirs) for theirs, ours in LM_EVALS.items() if theirs in told}
    given = values.pairs("model_args", told.pop("model_args", {}))
    backend = told.get("model")
    if backend in BACKENDS and not Path(backend).exists():
        if not given:
            raise UserError(f"--model {backend} names no model", "give its hub id or folder")
        del told["model"]
    for name, value in given.items():
        if name == "parallelize" and isinstance(value, bool):
            found |= {"device_map": "auto"} if value else {}
        elif name not in MODEL_ARGS:
            raise UserError(f"model_args {name} is not known here", nearest(name, MODEL_ARGS))
        else:
            own = MODEL_ARGS[name]
            found[own] = value if own in OF_OTHER_TYPES else str(value)
    for name, value in found.items():
        if told.setdefault(name, value) != value:
            raise UserError(
                f"{name} is given twice: {short_repr(told[name])} and {short_repr(value)}", "leave one of them out"
            )
