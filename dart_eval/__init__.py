"""dart-eval: an honest harness for dynamic FFN pruning of language models.

Python surface: `prune` (use a method while generating), `methods` (what there is), `Pruner` (a method of your own
parts), `evaluate` (run cells).
"""

from typing import TYPE_CHECKING, Any

from dart_eval.errors import UserError

if TYPE_CHECKING:
    from dart_eval.pruning.method import Pruner
    from dart_eval.pruning.prune import prune
    from dart_eval.pruning.registry import methods

__version__ = "0.1.0"
__all__ = ["Pruner", "UserError", "__version__", "evaluate", "methods", "prune"]


def __getattr__(name: str) -> Any:
    """These import torch and transformers, so they wait until somebody asks (`--help` does not)."""
    if name == "prune":
        from dart_eval.pruning.prune import prune

        return prune
    if name == "methods":
        from dart_eval.pruning.registry import methods

        return methods
    if name == "Pruner":
        from dart_eval.pruning.method import Pruner

        return Pruner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def evaluate(**options: Any) -> list[dict[str, Any]]:
    """Run what `dart-eval run` runs; options are the fields of `plan.RunConfig`, lists or comma-separated text.

        dart_eval.evaluate(tasks=["smoke_questions"], method=["dense", "dart"], sparsity=[0.5], limit=20)

    Returns:
        One row per metric of every cell: `model, label, method, params, sparsity, scope, task, metric, value, stderr,
        n, effective_sparsity, weights_read, ...` (those of `dart-eval tables --format json`).

    Raises:
        UserError: the input is wrong.
        RuntimeError: cells failed, or the output folder was deleted meanwhile; those that finished are in it.
    """
    from dart_eval.executors import run_all
    from dart_eval.executors.jobs import Silent
    from dart_eval.plan import config_from
    from dart_eval.results.tables import rows

    result = run_all([config_from(None, options)], Silent())
    if result.failed:
        raise RuntimeError(f"cells failed: {', '.join(cell.name for cell in result.failed)}")
    if result.lost:
        raise RuntimeError(f"files of finished cells have been deleted: {result.lost[0][1][0]}")
    return rows(result.records)
