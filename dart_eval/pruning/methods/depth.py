"""DART's allocation (arXiv 2601.22632): nine steps from a layer's change of the stream to its prune ratio.

Step 1 is `ChangeState.sensitivity`, step 2 `normalise_sensitivity`, steps 3 to 8 are `depth_aware`. Step 9, rounding,
is `counts.keep_counts`, which meets the budget exactly, unlike the published code.
"""

from __future__ import annotations

from collections.abc import Sequence

EARLY_SHARE, LATE_SHARE = 0.30, 0.15  # w_e, w_l: shares of the depth that count as early and late
EARLY_FACTOR, LATE_FACTOR = 0.25, 0.35  # alpha, beta: how far the first and the last layer are protected
MIN_PRUNE, MAX_PRUNE = 0.10, 0.90  # p_min, p_max
ROUNDS = 10  # of redistribution after clipping
EPS = 1e-6


def normalise_sensitivity(sensitivity: Sequence[float]) -> list[float]:
    """Min-max normalisation over layers (step 2): 0 for the least sensitive layer, 1 for the most."""
    low, high = min(sensitivity), max(sensitivity)
    return [(s - low) / (high - low + EPS) for s in sensitivity]


def depth_aware(
    normalised_sensitivity: Sequence[float], sparsity: float, protect: bool = True,
    sizes: Sequence[int] | None = None,
) -> list[float]:  # fmt: skip
    """Return the density of every layer by DART's depth-aware rule.

    Args:
        normalised_sensitivity: [L], 0 (the FFN changes the stream least) to 1 (most).
        sparsity: in [0, 1), over all layers; the mean of the densities is 1 - sparsity.
        protect: spare early and late layers (step 4). False is the paper's ablation: a depth factor of 1 everywhere.
        sizes: [L] neurons per layer, if they differ. The mean is then over neurons; the paper's models have layers of
            one size.

    Returns:
        [L] densities. Each layer's prune ratio stays between 0.1 and 0.9, unless the sparsity itself is outside.
    """
    layers = len(normalised_sensitivity)
    low, high = min(MIN_PRUNE, sparsity), max(MAX_PRUNE, sparsity)
    weight = [
        max(0.0, 1.0 - s) * (_depth_factor(i / (layers - 1) if layers > 1 else 0.5) if protect else 1.0)
        for i, s in enumerate(normalised_sensitivity)
    ]
    part = [1.0] * layers if sizes is None else [n * layers / sum(sizes) for n in sizes]
    budget = sparsity * layers
    total = sum(w * n for w, n in zip(weight, part, strict=True))
    prune = [budget * w / total if total > EPS else sparsity for w in weight]
    prune = [min(max(p, low), high) for p in prune]
    for _ in range(ROUNDS):
        missing = budget - sum(p * n for p, n in zip(prune, part, strict=True))
        if abs(missing) < EPS:
            break
        free = [i for i, p in enumerate(prune) if (p < high if missing > 0 else p > low)]
        if not free:
            break
        free_weight, free_part = sum(weight[i] * part[i] for i in free), sum(part[i] for i in free)
        for i in free:
            share = weight[i] / free_weight if free_weight > EPS else 1 / free_part
            prune[i] = min(max(prune[i] + missing * share, low), high)
    return [1.0 - p for p in prune]


def _depth_factor(x: float) -> float:
    """Return step 4's factor on the prune ratio at depth x in [0, 1]: it spares early and late layers."""
    if x < EARLY_SHARE:
        return EARLY_FACTOR + (1 - EARLY_FACTOR) * x / EARLY_SHARE
    if x > 1 - LATE_SHARE:
        return LATE_FACTOR + (1 - LATE_FACTOR) * (1 - x) / LATE_SHARE
    return 1.0
