"""dart-eval: evaluation of dynamic FFN pruning of language models, without looking ahead.

Python surface: `prune` (use a method while generating), `rounded_ffns` (on weights of few bits), `evaluate` (run
cells), `records` and `samples` (results as data frames), `methods` (what there is), `Method` (the base of
your own), `UserError` (what is raised where the input is wrong). docs/python.md shows each.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.api import evaluate
    from dart_eval.pruning.method import Method
    from dart_eval.pruning.registry import methods
    from dart_eval.pruning.session import prune
    from dart_eval.results.frame import records, samples
    from dart_eval.weights.rounding import rounded_ffns

__version__ = "0.3.0"
__all__ = [
    "Method", "UserError", "__version__", "evaluate", "methods", "prune", "records", "rounded_ffns",
    "samples",
]  # fmt: skip

# These import pydantic, torch or pandas, so they wait until somebody asks for them (`--help` does not).
_LAZY = {
    "Method": "dart_eval.pruning.method",
    "evaluate": "dart_eval.api",
    "methods": "dart_eval.pruning.registry",
    "prune": "dart_eval.pruning.session",
    "records": "dart_eval.results.frame",
    "rounded_ffns": "dart_eval.weights.rounding",
    "samples": "dart_eval.results.frame",
}


def __getattr__(name: str) -> Any:
    """A public name whose module is imported now."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    remedy = "; write dart_eval.evaluate(model=..., tasks=...)" if name == "simple_evaluate" else ""  # lm-eval's name
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{remedy}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
