"""Comparisons in words: each method against dense, and methods against each other where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dart_eval.results.record import Metric
from dart_eval.results.report.text import listed, number, several

FEW = 2  # comparisons of one pair that are all written out with their numbers


@dataclass(frozen=True)
class Comparison:
    """Two cells on one task: how many standard errors the first is better by (negative: worse)."""

    first: str
    second: str
    task: str
    a: Metric
    b: Metric
    z: float
    mean: bool = False  # of several tasks


def sentences_of(made: Sequence[Comparison], z: float) -> list[tuple[str, str]]:
    """(who, what can be said): one sentence per method against dense, and one about methods among each other.

    z: standard errors beyond which a difference counts.
    """
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for c in made:
        pairs.setdefault((c.first, c.second), []).append(c)
    dense = sorted(p for p in pairs if p[1] == "dense")
    others = sorted(p for p in pairs if p[1] != "dense")
    found = [(f"{first} against {second}:", _pair(pairs[first, second], z)) for first, second in dense]
    if len(others) == 1:
        found.append((f"{others[0][0]} against {others[0][1]}:", _pair(pairs[others[0]], z)))
    elif others:
        found.append(("Methods among each other:", _among([pairs[p] for p in others], z)))
    return found


def _pair(made: Sequence[Comparison], z: float) -> str:
    groups = (
        ("worse on", [c for c in made if c.z < -z]),
        ("better on", [c for c in made if c.z > z]),
        ("no difference shown on", [c for c in made if abs(c.z) <= z]),
    )
    return "; ".join(f"{words} {_tasks(found, len(made) <= FEW)}" for words, found in groups if found) + "."


def _tasks(found: Sequence[Comparison], all_numbers: bool) -> str:
    """Where; with numbers for few comparisons, for the mean over tasks, or for the clearest."""
    mean = next((c for c in found if c.mean), None)
    shown = mean or max(found, key=lambda c: abs(c.z))
    rest = [c for c in found if c is not mean]
    return listed([_values(c) if all_numbers or c is shown else c.task for c in ([mean, *rest] if mean else rest)])


def _among(pairs: Sequence[Sequence[Comparison]], z: float) -> str:
    ahead: dict[str, list[str]] = {}
    silent = 0
    for made in pairs:
        better, worse = [c for c in made if c.z > z], [c for c in made if c.z < -z]
        for found, winner, loser in ((better, made[0].first, made[0].second), (worse, made[0].second, made[0].first)):
            if found:
                ahead.setdefault(winner, []).append(f"{loser} (in {len(found)} of {len(made)})")
        silent += not better and not worse
    parts = [f"{winner} better than {listed(losers)}" for winner, losers in sorted(ahead.items())]
    if silent:
        parts.append(f"no difference shown in {'any' if not parts else silent} of {several(len(pairs), 'pair')}")
    return "; ".join(parts) + "."


def comparisons_of(made: Sequence[Comparison], z: float) -> list[list[str]]:
    """Rows of a table: first, second, task, metric, both values, standard errors apart, verdict."""
    rows = []
    for c in made:
        verdict = "better" if c.z > z else "worse" if c.z < -z else "not shown"
        apart = f"{c.z:+.2f}".replace("-", "\u2212")
        rows.append([c.first, c.second, c.task, c.a.metric, _short(c.a.value), _short(c.b.value), apart, verdict])
    return rows


def _values(c: Comparison) -> str:
    return f"{c.task} ({c.a.metric} {_short(c.a.value)} against {_short(c.b.value)})"


def _short(value: float) -> str:
    """Three digits are enough for a sentence."""
    return f"{value:.3f}" if abs(value) < 10 else number(value)
