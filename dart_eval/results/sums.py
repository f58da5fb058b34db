"""A metric as a quotient of sums over documents: its value, its standard error, and each document's influence.

The digest of the code in a cell's key covers this file, since records hold what it gives.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

# kind -> c of c * sum x / sum w over documents; of perplexities and bits x is a log-likelihood. Of a root mean square x
# is a sum of squares.
SCALES = {"mean": 1.0, "ratio": 1.0, "rms": 1.0, "log-perplexity": -1.0, "bits": -1 / math.log(2)}


def linearised(kind: str, sums: Values) -> tuple[float, Values]:
    """Return a metric and the influence value of each document on it (Cochran 1977, ch. 6).

    Args:
        kind: a key of `SCALES`.
        sums: [n, 2] x and w of each document. A mean's w are weights, and its x are values times weights.

    Returns:
        The value, of a perplexity its logarithm, and [n] influence values, which sum to 0.
    """
    x, w = sums.T
    ratio, scale = float(x.sum() / w.sum()), SCALES[kind]
    if kind == "rms":
        root = math.sqrt(ratio)
        return root, (x - ratio * w) / w.sum() / (2 * root or 1.0)
    return scale * ratio, scale * (x - ratio * w) / w.sum()


def as_recorded(kind: str, sums: ArrayLike) -> tuple[float, float | None]:
    """Return a metric as records give it, with its standard error over documents; None for one document.

    Of a perplexity it is no logarithm, and its error follows by the delta method; None where that has no number.
    """
    value, influence = linearised(kind, np.asarray(sums, float))
    n = len(influence)
    error = math.sqrt(n / (n - 1) * float(influence @ influence)) if n > 1 else None
    if kind != "log-perplexity":
        return value, error
    return exp(value), None if error is None or math.isinf(exp(value)) else exp(value) * error


def bleu_error(counts: ArrayLike) -> float | None:
    """Return the standard error of corpus BLEU by the jackknife (Efron and Tibshirani 1993, ch. 11); None for one text.

    Args:
        counts: [n, 10] hyp_len, ref_len, correct 1-grams to 4-grams, and their totals, of each text.
    """
    from sacrebleu.metrics import BLEU  # comes with lm-eval; slow to import

    table = np.asarray(counts)
    n, without = len(table), []
    for hyp, ref, *grams in (table.sum(0) - table).tolist():
        without.append(BLEU.compute_bleu(grams[:4], grams[4:], hyp, ref, smooth_method="exp").score)
    return math.sqrt((n - 1) / n * ((np.array(without) - np.mean(without)) ** 2).sum()) if n > 1 else None


def exp(value: float) -> float:
    """e to the power of `value`; infinite where that is beyond all floats."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
