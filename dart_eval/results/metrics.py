"""The known metrics, each described once: its values, its format, and its rank as a task's main metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dart_eval.results.record import Metric

ACCURACY, SUMMARIES, PERPLEXITY, OTHER = "Accuracy", "Summaries", "Perplexity (lower is better)", "Other metrics"
DISTANCE = "Distance to dense"
GROUPS = (ACCURACY, SUMMARIES, PERPLEXITY, DISTANCE, OTHER)
BY_SECOND_FORWARD = frozenset({"kl", "kl_p95", "kl_p99", "top1"})  # a run measures them with dense's logits beside
GOLD = "gold_ll"  # the log-likelihood of the right answer, which samples of choice tasks hold beside their metrics


@dataclass(frozen=True)
class Kind:
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
    "kl": Kind(DISTANCE, kind="ratio"),
    **dict.fromkeys(("kl_p95", "kl_p99"), Kind(DISTANCE, kind=None)),
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
