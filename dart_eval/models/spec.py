"""The choice of a model. No torch here: it is part of a run's options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """The user's choice of a model, and how to load it: options of `dart-eval run` (docs/options.md).

    Attributes:
        model: the demo alias, a local folder, a GGUF file or a hub id; None: the demo model.
        device_map: for accelerate; replaces `device`.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    peft: str | None = None
    load_in: str | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None
