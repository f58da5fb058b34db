"""What a user is told where a library cannot find or load a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

from dart_eval.models import demo_model, hub
from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.weights.checkpoint import no_tensors, unknown_word


def untrusted(name: str, code: str) -> UserError:
    """Return the refusal of a model's own code."""
    return UserError(
        f"model {name!r} has its own code ({code}), which runs only with your consent",
        "read the code; if you trust it, add --trust-remote-code",
    )


def explain(name: str, error: BaseException, settings: Mapping[str, object] = {}) -> UserError:
    """Return the user's message for an error of a library. settings: of config.json."""
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        return no_tensors(name, error)
    if isinstance(error, KeyError) and (unknown := unknown_word(settings, error.args[0])):
        return UserError(f"config.json of model {name} says {unknown}, which transformers does not know", "correct it")
    if out_of_memory(error):
        return UserError(f"memory ran out while model {name!r} was loaded", "free memory, or use a smaller model")
    if "trust_remote_code" in text:
        return untrusted(name, "auto_map or custom_generate")
    if hub.UNREACHABLE.search(text):
        return UserError(
            f"model {name!r} is not a local folder, and the hub cannot be reached",
            f"give a local folder, or the demo alias {demo_model.ALIAS}, or check the network (HF_ENDPOINT)",
        )
    if "not a valid model identifier" in text or "Repository Not Found" in text:
        return UserError(
            f"model {name!r} was found neither as a folder nor on the hub", "check the name and your access"
        )
    if isinstance(error, ImportError):  # a library for quantised weights is missing
        return UserError(f"model {name!r} cannot be loaded ({text[:300]})", "install the packages that it needs")
    return UserError(
        f"model {name!r} cannot be loaded ({text[:300]})",
        "it must be a complete causal language model with its tokenizer",
    )
