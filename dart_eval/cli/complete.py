"""Completion of values in a shell. Nothing here imports torch: a person waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Complete = Callable[[str], list[str]]


def words(known: Iterable[str] | Callable[[], Iterable[str]]) -> Complete:
    """Return a completion of these words; a function is called when a shell asks."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in (known() if callable(known) else known) if word.startswith(incomplete)]

    return complete


def listed(known: Callable[[str], Iterable[str]]) -> Complete:
    """Return a completion of the last item of a comma-separated list.

    Args:
        known: returns the names for the beginning of an item.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in sorted(known(last)) if name.startswith(last)]

    return complete


def methods(_begun: str = "") -> Iterable[str]:
    """Return the names of methods."""
    from dart_eval.pruning.registry import methods as known

    return known()


def slots() -> Iterable[str]:
    """Return the slots that parts fit into."""
    from dart_eval.pruning.registry import parts

    return parts()


def tasks(begun: str) -> Iterable[str]:
    """Return names of tasks: the common ones before anything is typed, then lm-eval's thousands too."""
    from dart_eval.evaluation.task_names import ALIASES, COMMON, names

    return {*ALIASES, *COMMON, *(names() if begun else ())}
