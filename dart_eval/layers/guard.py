"""One session per model, since two masks would compound."""

from __future__ import annotations

from torch import nn

from dart_eval.util.errors import UserError

GUARD = "_under_prune"  # an attribute of all modules of a model with a session


def refuse_second(model: nn.Module) -> None:
    """Refuse a model with a session on it or on a part of it, and an object that is not a model.

    Raises:
        UserError: with the reason.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"prune() needs a loaded model, and {model!r} is a {type(model).__name__}",
            "load it first, with transformers.AutoModelForCausalLM",
        )
    if any(GUARD in module.__dict__ for module in model.modules()):
        raise UserError("this model is already under another prune()", "leave that block")
