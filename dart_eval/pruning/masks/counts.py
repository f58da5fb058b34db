"""From densities of layers to exact counts of neurons: a sparsity is met to the neuron."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from dart_eval.util.errors import UserError


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity if it is a number in [0, 1).

    Raises:
        UserError: it is not.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise UserError(f"sparsity {sparsity!r} is not a number", "for example 0.5")
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} is outside [0, 1)",
            "it is the share of the FFN weights that a token does not read: write 0.7 for 70 %",
        )
    return sparsity


def keep_counts(ratios: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[int]:
    """Return the neurons that each layer keeps: rounded down, then one more for the largest fractions.

    Args:
        ratios: [L] densities with sum(ratio * size) = (1 - sparsity) * sum(size).
        sizes: [L] neurons per layer.
        sparsity: the labelled sparsity in [0, 1), over all layers.

    Returns:
        [L] counts with sum = round((1 - sparsity) * sum(sizes)), each between 0 and its layer's size.
    """
    exact = [r * n for r, n in zip(ratios, sizes, strict=True)]
    return exact_counts(exact, sizes, round((1.0 - sparsity) * sum(sizes)))


def exact_counts(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Return whole numbers near `wanted`, between 0 and `most`, that sum to `total` (at most sum(most))."""
    if not 0 <= total <= sum(most):
        raise ValueError(f"{total} does not fit between 0 and {sum(most)}")
    # 1e-9: (1 - 0.7) * 10 is 3.0000000000000004 or 2.9999999999999996 by luck; a whole number stays whole.
    exact = [max(0.0, min(w, n)) for w, n in zip(wanted, most, strict=True)]
    counts = [math.floor(e + 1e-9) for e in exact]
    # One pass is enough, unless ratios were clipped at their bounds and miss the total by much.
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        open_layers = [i for i, n in enumerate(most) if (counts[i] < n if step > 0 else counts[i] > 0)]
        open_layers.sort(key=lambda i: (step * (counts[i] - exact[i]), i))
        for i in open_layers[: abs(missing)]:
            counts[i] += step
    return counts


def in_steps(counts: Sequence[int], most: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return whole multiples of each layer's step near `counts`, with a sum of at most theirs.

    The remainder of rounding down adds a step to the layers that miss most of one; the rest goes to layers with
    step 1. The sum misses that of `counts` by less than one step, and by nothing if such layers have room.

    Args:
        counts: [L].
        most: [L] upper bounds, multiples of the steps.
        steps: [L], 1 for layers that take any count.
    """
    rounded = [n - n % s for n, s in zip(counts, steps, strict=True)]
    rest = sum(counts) - sum(rounded)
    for i in sorted(range(len(rounded)), key=lambda i: (-(counts[i] % steps[i]) / steps[i], i)):
        if counts[i] % steps[i] and steps[i] <= rest:
            rounded[i] += steps[i]
            rest -= steps[i]
    any_count = [i for i, s in enumerate(steps) if s == 1]
    rest = min(rest, sum(most[i] - rounded[i] for i in any_count))
    if rest:
        wanted = [rounded[i] + rest / len(any_count) for i in any_count]
        fitting = exact_counts(wanted, [most[i] for i in any_count], sum(rounded[i] for i in any_count) + rest)
        for i, n in zip(any_count, fitting, strict=True):
            rounded[i] = n
    return rounded


@dataclass(frozen=True)
class Counts:
    """Counts of the neurons that a token reads, per layer.

    Attributes:
        mask: [L] neurons in the mask.
        taken: [L] neurons of the mask that a token takes. It reads their rows of every matrix not read whole.
        written: [L] taken neurons that a token writes. It reads their columns of down.
        full_matrices: matrices that a token reads whole.
    """

    mask: list[int]
    taken: list[int]
    written: list[int]
    full_matrices: int = 0


def chosen_counts(
    densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, full_matrices: int,
    title: str = "the choice",
) -> Counts:  # fmt: skip
    """Return the neurons per layer that a token's choice reads, at weights read = 1 - sparsity.

    A gated FFN whose gate is read whole reads (all + taken + written) / 3; a plain one, whose up is read whole,
    (all + taken) / 2. In general matrices * read = full * all + (matrices - 1 - full) * taken + written. The total over
    layers is exact to the neuron, and each layer is right up to rounding.

    Args:
        densities: [L] share of each layer's weights that is read, with mean 1 - sparsity.
        sizes: [L] neurons per layer.
        matrices: 3 for gated FFNs, 2 for plain ones.
        full_matrices: matrices that are read whole.
        title: the choice in an error message.

    Raises:
        UserError: what is read before the choice exceeds what the sparsity leaves.
    """
    everything, middle = sum(sizes), matrices - 1 - full_matrices
    mask, n_kept = [*sizes], round((1.0 - sparsity) * everything)
    rest = matrices * n_kept - full_matrices * everything
    if n_kept == everything:
        return Counts(mask, mask, mask, full_matrices)
    if rest < 0:
        raise UserError(
            f"{title} reads {full_matrices} of the FFN's {matrices} matrices whole, which is more than sparsity "
            f"{sparsity:g} leaves",
            f"use a sparsity up to {math.floor(100 * (1 - full_matrices / matrices)) / 100:g}",
        )
    # At `matrices * density` nothing is left to take.
    room = [matrices * r * n - full_matrices * n for r, n in zip(densities, sizes, strict=True)]
    if middle == 0:
        taken = exact_counts(room, sizes, rest)
        return Counts(mask, taken, taken, full_matrices)
    share = [x / (middle + 1) for x in room]
    most_taken = min(rest // middle, math.ceil(rest / (middle + 1)))
    taken = exact_counts(share, sizes, most_taken)
    unwritten = [x - middle * s for x, s in zip(room, share, strict=True)]
    written = exact_counts(unwritten, taken, min(most_taken, rest - middle * most_taken))
    return Counts(mask, taken, written, full_matrices)
