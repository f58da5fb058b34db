"""One session a model: two masks would compound."""

from __future__ import annotations

from torch import nn

from dart_eval.util.errors import UserError

GUARD = "_under_prune"  # an attribute of all modules of a model that a session is at work on


def refuse_second(model: nn.Module) -> None:
    """Refuse a model that a session is at work on, or on a part of it: two masks would compound; and what is no model.

    Raises:
        UserError: one is, or it is none.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"prune() needs a loaded model, and {model!r} is a {type(model).__name__}",
            "load it first, with transformers.AutoModelForCausalLM",
        )
    if any(GUARD in module.__dict__ for module in model.modules()):
        raise UserError("this model is under another prune()", "leave that one first")
