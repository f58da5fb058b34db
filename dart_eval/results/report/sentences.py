"""Comparisons in words: what was shown at p (Holm) < .05, what was not, and what was not tested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dart_eval.results import stats
from dart_eval.results.report.text import THIN, listed, number, several

FEW = 2  # comparisons of one method, or methods alike, that are written out with their numbers
MANY = 12  # names in a sentence


@dataclass(frozen=True)
class Comparison:
    """The paired test of the first cell against the second on one task.

    Attributes:
        result: with a p. choices: None against dense; else how often that p counts, for the first was chosen as the
            best of several. p_holm: adjusted over all comparisons of a finding.
    """

    first: str
    second: str
    task: str
    metric: str
    higher_is_better: bool
    result: stats.Paired
    choices: float | None = None
    p_holm: float | None = None

    @property
    def p(self) -> float:
        """Of the test alone."""
        return 1.0 if self.result.p is None else self.result.p

    @property
    def verdict(self) -> str:
        """`better` or `worse` where that was shown, else empty."""
        difference = self.result.difference
        if self.p_holm is None or self.p_holm >= stats.ALPHA or not difference:
            return ""
        return "better" if (difference > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Untested:
    """A comparison that could not be made, and why."""

    first: str
    second: str
    task: str
    reason: str


def against_dense(made: Iterable[Comparison]) -> list[tuple[str, str]]:
    """(who, what): one sentence per method, and one for all those that none differs of on the same tasks."""
    methods: dict[tuple[str, str], list[Comparison]] = {}
    for c in made:
        methods.setdefault((c.first, c.second), []).append(c)
    silent: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for who, found in sorted(methods.items()):
        if not any(c.verdict for c in found):
            silent.setdefault((who[1], *(c.task for c in found)), []).append(who)
    merged = {who for alike in silent.values() if len(alike) > FEW for who in alike}
    said = [(f"{first} against {second}:", _pair(found)) for (first, second), found in sorted(methods.items())
            if (first, second) not in merged]  # fmt: skip
    for (second, *tasks), alike in silent.items():
        if len(alike) > FEW:
            where = tasks[0] if len(tasks) == 1 else f"any of {listed(tasks, MANY)}"
            said.append((f"{listed([first for first, _ in alike], MANY)} against {second}:",
                         f"no difference shown on {where}."))  # fmt: skip
    return said


def _pair(made: Sequence[Comparison]) -> str:
    groups = (
        ("worse on", [c for c in made if c.verdict == "worse"]),
        ("better on", [c for c in made if c.verdict == "better"]),
        ("no difference shown on", [c for c in made if not c.verdict]),
    )
    return "; ".join(f"{words} {_tasks(found, len(made) <= FEW)}" for words, found in groups if found) + "."


def _tasks(found: Sequence[Comparison], all_numbers: bool) -> str:
    """Where, with the numbers of what was shown."""
    return listed([f"{c.task} ({c.metric} {_numbers(c)})" if all_numbers or c.verdict else c.task for c in found], MANY)


def best(made: Iterable[Comparison]) -> list[tuple[str, str]]:
    """(who, what): one sentence per task, about the best method and what it was shown to be better than."""
    contests: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in made:
        contests.setdefault((c.task, c.metric, c.first), []).append(c)
    said = []
    for (task, metric, first), found in sorted(contests.items()):
        ahead = sorted((c for c in found if c.verdict), key=lambda c: (c.p, c.second))
        behind = [c for c in found if not c.verdict]
        text = f"{first} ({metric} {_short(found[0].result.value_a)})"
        if ahead:
            text += f", better than {listed([f'{c.second} ({_numbers(c, own=False)})' for c in ahead], 4)}"
        if behind and not ahead:
            names = [f"{c.second} ({_numbers(c, own=False)})" if len(behind) <= FEW else c.second for c in behind]
            text += ", not shown to be better than " + (
                f"any of the {len(names)} others" if len(names) > FEW else listed(names)
            )
        elif behind:
            text += f"; not shown for {listed([c.second for c in behind], MANY)}"
        said.append((f"{task}:", f"{text}."))
    return said


def left_out(untested: Iterable[Untested]) -> list[str]:
    """Sentences about comparisons that were not made, by reason."""
    reasons: dict[str, list[str]] = {}
    for u in untested:
        reasons.setdefault(u.reason, []).append(f"{u.first} against {u.second} on {u.task}")
    return [f"{several(len(names), 'comparison')} not made ({listed(list(dict.fromkeys(names)), 3)}): {reason}."
            for reason, names in reasons.items()]  # fmt: skip


def unreachable(made: Sequence[Comparison]) -> list[str]:
    """A sentence about differences that resampling could not have shown among so many comparisons."""
    lowest = 1.5 / (1 + stats.RESAMPLES)
    names = [f"{c.first} against {c.second} on {c.task}" for c in made
             if not c.verdict and c.result.test == stats.BOOTSTRAP and c.p < lowest]  # fmt: skip
    if not names:
        return []
    return [f"{several(len(names), 'comparison')} ({listed(names, 3)}) reach the smallest p that {stats.RESAMPLES} "
            "resamples can give, which is not enough among so many comparisons: a report of fewer methods or tasks "
            "could show more."]  # fmt: skip


def rows(made: Sequence[Comparison]) -> list[list[str]]:
    """first, second, task, metric, both values, difference, interval, p, p (Holm), verdict."""
    return [
        [c.first, c.second, c.task, c.metric, _short(c.result.value_a), _short(c.result.value_b), _difference(c),
         _interval(c) or "-", _chance(c.p), _chance(c.p_holm), c.verdict or "not shown"]
        for c in made
    ]  # fmt: skip


def _numbers(c: Comparison, own: bool = True) -> str:
    """Values, difference and its interval; without the first value where that stands before."""
    values = f"{_short(c.result.value_a)} against {_short(c.result.value_b)}" if own else _short(c.result.value_b)
    return f"{values}: {_difference(c)} {_interval(c)}".rstrip()


def _difference(c: Comparison) -> str:
    """With its sign; of perplexities their ratio."""
    if c.result.ratio is not None:
        return f"×{THIN}{_short(c.result.ratio)}"
    return _signed(c.result.difference)


def _interval(c: Comparison) -> str:
    low, high = c.result.low, c.result.high
    if low is None or high is None:
        return ""
    if c.result.ratio is not None:
        return f"[{_short(stats.exp(low))}, {_short(stats.exp(high))}]"
    return f"[{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    text = _short(value)
    return text if value <= 0 or float(text.replace("∞", "inf")) == 0 else f"+{text}"


def _short(value: float) -> str:
    """Three digits are enough for a sentence."""
    if not math.isfinite(value) or abs(value) >= 10:
        return number(value)
    text = f"{value:.3f}"
    return "0.000" if text == "-0.000" else text.replace("-", "\u2212")


def _chance(p: float | None) -> str:
    return "-" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}"
