"""The known metrics, each described once with its rank as a task's main metric, and the formats of all numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dart_eval.results.record import Metric

ACCURACY, SUMMARIES, PERPLEXITY, OTHER = "Accuracy", "Summaries", "Perplexity (lower is better)", "Other metrics"
DISTANCE = "Distance to dense"
GROUPS = (ACCURACY, SUMMARIES, PERPLEXITY, DISTANCE, OTHER)
NO_NUMBER = "no number"  # for a metric whose answers were NaN or infinite
GOLD = "gold_ll"  # the log-likelihood of the right answer, which samples of choice tasks hold beside their metrics


class Kind(NamedTuple):
    """Properties of a metric by its name."""

    group: str = OTHER  # its table
    rank: int = 9  # the metric of the lowest rank is a task's main one
    kind: str | None = "mean"  # how the value follows from sums over documents (of `sums.SCALES`); None: it does not
    percent: bool = False  # whether it is a share, shown in per cent by boards and papers
    chance: bool = False  # whether its value under guessing follows from the number of choices
    digits: int | None = None  # after the point, if the size of the value does not decide


RIGHT = Kind(ACCURACY, 1, percent=True)  # the share of generated answers that are right
METRICS = {
    "acc": Kind(ACCURACY, 0, percent=True, chance=True),
    "acc_norm": Kind(ACCURACY, percent=True, chance=True),
    "exact_match": RIGHT,
    "em": Kind(ACCURACY),
    "prompt_level_strict_acc": RIGHT,
    "prompt_level_loose_acc": Kind(ACCURACY, percent=True),
    **dict.fromkeys(("pass@1", "pass_at_1", "score", *(str(2**n) for n in range(12, 18))), RIGHT),  # RULER's lengths
    **dict.fromkeys(("f1", "mcc"), Kind(ACCURACY)),
    "rougeL": Kind(SUMMARIES, 2, percent=True),
    **dict.fromkeys(("rouge1", "rouge2"), Kind(SUMMARIES, percent=True)),
    "bleu": Kind(SUMMARIES, kind=None),
    "summary_words": Kind(SUMMARIES, digits=1),
    "empty": Kind(SUMMARIES),
    "word_perplexity": Kind(PERPLEXITY, 3, "log-perplexity"),
    "byte_perplexity": Kind(PERPLEXITY, kind="log-perplexity"),
    "bits_per_byte": Kind(PERPLEXITY, kind="bits"),
    "perplexity": Kind(PERPLEXITY, kind="log-perplexity"),
    "flips": Kind(DISTANCE, percent=True),
    "dense_rougeL": Kind(DISTANCE, percent=True),
    "dense_tokens": Kind(DISTANCE, digits=1),
    "length": Kind(DISTANCE, kind="ratio"),
    **dict.fromkeys(("limited", "loops"), Kind(DISTANCE, percent=True)),
    **dict.fromkeys(("kl", "kl_reverse"), Kind(DISTANCE, kind="ratio", digits=5)),
    **dict.fromkeys(("kl_p50", "kl_p95", "kl_p99"), Kind(DISTANCE, kind=None, digits=5)),
    "rms_dp": Kind(DISTANCE, kind="rms", percent=True),
    "top1": Kind(DISTANCE, kind="ratio", percent=True),
}
WORDS = {"acc": "accuracy", "rougeL": "ROUGE-L", "word_perplexity": "perplexity"}


def kind_of(metric: str) -> Kind:
    """Return the properties of a metric, named with or without its filter."""
    return METRICS.get(metric.partition(",")[0], Kind())


def title_of(metric: str) -> str:
    """Return a metric's title, without its filter."""
    name = metric.partition(",")[0]
    return WORDS.get(name, name)


def order(metric: str) -> tuple[int, str]:
    """Return the sort key of columns: the order of `METRICS`, then others by name."""
    return [*METRICS, metric].index(metric), metric


def main(metrics: Iterable[Metric], named: Collection[tuple[str, str]] = (), gold: bool = False) -> list[Metric]:
    """Return each task's main metric, in the order of the tasks.

    It is the metric of the lowest rank among those with a direction, else the first; never a distance to dense.

    Args:
        metrics: of all tasks.
        named: (task, metric) that come before all others.
        gold: whether the log-likelihoods of right answers follow, of those tasks that have them.
    """
    everything = list(metrics)
    chosen: dict[str, Metric] = {}
    for m in sorted(everything, key=lambda m: ((m.task, m.label) not in named, kind_of(m.metric).rank)):
        if m.higher_is_better is not None and m.metric != GOLD and kind_of(m.metric).group != DISTANCE:
            chosen.setdefault(m.task, m)
    right = [m for m in everything if gold and m.metric == GOLD and m.task in chosen]
    return [m for m in everything if chosen.get(m.task) is m] + right


# -- formats -----------------------------------------------------------------------------------------------------------


def _digits(value: float) -> int:
    return 4 if abs(value) < 10 else 1 if abs(value) >= 100 else 2


def number(value: float, digits: int | None = None) -> str:
    """A metric's value: four digits after the point below 10, two below 100, one beyond."""
    return f"{value:.{_digits(value) if digits is None else digits}f}"


def three(value: float) -> str:
    """A share of 1."""
    return f"{value:.3f}"


def with_error(metric: str, value: float, stderr: float | None) -> str:
    """A value and its standard error, with equally many digits."""
    if not math.isfinite(value):
        return NO_NUMBER
    known = kind_of(metric).digits
    digits = _digits(value) if known is None else known
    text = number(value, digits)
    return text if stderr is None or math.isnan(stderr) else f"{text} ± {number(stderr, digits)}"


def short(metric: str, value: float, stderr: float | None) -> str:
    """A value and its standard error in brief: shares in per cent, `44.0 ±5.0`, those of a broken model `8.4e9`."""
    if not math.isfinite(value):
        return NO_NUMBER
    scale = 100.0 if kind_of(metric).percent else 1.0
    digits = 1 if scale > 1 or abs(value) >= 10 else 2
    values = [value] if stderr is None or math.isnan(stderr) else [value, stderr]
    return " ±".join(_power(x) if abs(value) >= 1e6 else f"{scale * x:.{digits}f}" for x in values)


def _power(value: float) -> str:
    """`8.4e9`; `inf`."""
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def chance(p: float | None) -> str:
    """A p-value."""
    return "-" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}"


def signed(value: float) -> str:
    """A difference: `+0.0300`."""
    return f"{value:+.4f}"


def interval(low: float | None, high: float | None) -> str:
    """The ends of an interval of a difference."""
    return "-" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def asked(sparsity: float) -> str:
    """The read that a sparsity asks for, of the weights as they are stored: `30 %` for 0.7."""
    return f"{100 * (1 - sparsity):.4g} %"


def percent(value: float, *ends: float) -> str:
    """A share of 1 in whole per cent, with the ends of its interval: `30 %`, `30 % [25, 36]`."""
    whole, *others = (f"{round(100 * x) + 0}" for x in (value, *ends))
    return f"{whole} %" + (f" [{', '.join(others)}]" if others else "")


def multiple(value: float, *ends: float) -> str:
    """A multiple, with the ends of its interval: `1.08x [1.07, 1.10]`, `29.8x`, `2.1e7x`."""
    if not math.isfinite(value):
        return NO_NUMBER
    digits = 3 if abs(value - 1) < 0.0495 else 2 if value < 10 else 1 if value < 100 else 0
    first, *others = (f"{x:.{digits}f}" if x < 1e4 else _power(x) for x in (value, *ends))
    return f"{first}x" + (f" [{', '.join(others)}]" if others else "")


def size(value: float, unit: str = "B") -> str:
    """A count or bytes as `9.7 MB`, `180 kB`: two digits, or all before the point."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.{1 if value < 10 * limit else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def small_share(value: float) -> str:
    """A share that is often tiny, in per cent: `0.12 %`, `< 0.01 %`."""
    digits = ".0f" if value >= 0.995 else ".2g"
    return "0 %" if value == 0 else "< 0.01 %" if value < 1e-4 else f"{100 * value:{digits}} %"
