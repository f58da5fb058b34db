"""How often the paired tests raise a false alarm, how often their intervals hold the truth (docs/numbers.md), and how
many answers it takes to notice a fall of accuracy (docs/recipes.md).

    python scripts/simulate_tests.py [RUNS]

Paired differences are drawn whose true mean is 0, and each draw is tested as `compare` would test it. It takes some
minutes on one core for 4000 runs.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.stats import binom, ttest_1samp

from dart_eval.results.stats import paired

DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "lognormal": lambda rng, n: rng.lognormal(size=n) - np.exp(0.5),
    "70 % zero, else normal": lambda rng, n: np.where(rng.random(n) < 0.7, 0.0, rng.normal(size=n)),
}
CASES = [(name, n) for n in (12, 30) for name in DRAWS] + [("lognormal", 100)]


def row(name: str, n: int, runs: int) -> list[float]:
    """The shares of runs with a false alarm (two-sided, one-sided), with the truth in the interval, and of the t-test.

    Args:
        name: the distribution of the differences.
        n: documents in a run.
        runs: how many are drawn.
    """
    rng = np.random.default_rng(n)
    two, one, holds, t_test = 0, 0, 0, 0
    for _ in range(runs):
        differences = DRAWS[name](rng, n)
        found = paired("mean", differences, np.zeros(n), higher_is_better=True)
        two += found.p is not None and found.p < 0.05
        one += found.p_worse is not None and found.p_worse < 0.05
        holds += found.low is None or found.high is None or found.low <= 0 <= found.high
        t_test += bool(ttest_1samp(differences, 0).pvalue < 0.05)
    return [x / runs for x in (two, one, holds, t_test)]


def noticed(n: int, fall: float, flips: float, level: float) -> float:
    """The share of draws in which an exact McNemar test notices a fall of accuracy.

    Args:
        n: answers. fall: in accuracy. flips: share of answers that turn wrong, and as many right, beside the fall.
        level: of the one-sided test.
    """
    draws = np.random.default_rng(n).multinomial(n, [fall + flips, flips, 1 - fall - 2 * flips], size=4000)
    return float((binom.sf(draws[:, 0] - 1, draws[:, 0] + draws[:, 1], 0.5) < level).mean())


def main() -> None:
    """Print the tables."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    print("| differences | n | false alarms, two-sided | one-sided | coverage of the interval | t-test |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, n in CASES:
        print(f"| {name} | {n} | " + " | ".join(f"{x:.3f}".lstrip("0") for x in row(name, n, runs)) + " |", flush=True)
    print("| rows | fall of 10 points noticed at n = 100 | 5 points, 100 | 5 points, 1000 | 2 points, 5000 |")
    print("| --- | --- | --- | --- | --- |")
    for rows in (1, 15, 100):
        shares = (
            noticed(n, fall, 0.05, 0.05 / rows) for fall, n in ((0.1, 100), (0.05, 100), (0.05, 1000), (0.02, 5000))
        )
        print(f"| {rows} | " + " | ".join(f"{100 * x:.0f} %" for x in shares) + " |")


if __name__ == "__main__":
    main()
