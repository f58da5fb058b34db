"""What a shell offers while a value is typed. Nothing here imports torch: a person waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Complete = Callable[[str], list[str]]


def words(known: Iterable[str] | Callable[[], Iterable[str]]) -> Complete:
    """Offers these words; those of a function are looked up when a shell asks."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in (known() if callable(known) else known) if word.startswith(incomplete)]

    return complete


def listed(known: Callable[[str], Iterable[str]]) -> Complete:
    """Offers names for the last item of a comma-separated list.

    Args:
        known: the names, given how the item begins.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in sorted(known(last)) if name.startswith(last)]

    return complete


def methods(_begun: str = "") -> Iterable[str]:
    """Names of methods."""
    from dart_eval.pruning.registry import methods as known

    return known()


def slots() -> Iterable[str]:
    """Slots that parts fit into."""
    from dart_eval.pruning.registry import parts

    return parts()


def tasks(begun: str) -> Iterable[str]:
    """Names of tasks: before anything is typed the common ones, then lm-eval's thousands too."""
    from dart_eval.evaluation.task_names import ALIASES, COMMON, names

    return {*ALIASES, *COMMON, *(names() if begun else ())}
