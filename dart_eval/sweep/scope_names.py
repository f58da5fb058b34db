"""The scopes: which positions run pruned when answers are scored, each in a sentence for the help.

What they do stands in `evaluation.scoring` and `evaluation.scopes`. Nothing here imports torch.
"""

from __future__ import annotations

import typing
from typing import Literal

Scope = Literal["scored", "continuation", "all", "last", "last-50", "last-99", "decode"]
SCOPES: tuple[str, ...] = typing.get_args(Scope)
MEANINGS = {
    "scored": "the last prompt token and the answer; no mask sees the answer",
    "continuation": "the answer's own tokens, so that its first one is predicted dense (COUNTDOWN)",
    "all": "prompt and answer; a mask is made from both, so it looks ahead (the public DART code)",
    "last": "the last input token alone (GRIFFIN)",
    "last-50": "the last 50 % of the input, rounded down (TEAL)",
    "last-99": "the last 99 % of it (WINA)",
    "decode": "what is computed one token at a time, which no given answer is, so nothing (CoreInfer)",
}
HELP = "Choose which tokens run pruned when an answer is scored. " + " ".join(
    f"{name}: {meaning}." for name, meaning in MEANINGS.items()
)
