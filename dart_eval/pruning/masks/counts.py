"""How a sparsity is spread over layers: first the density of each layer, then exact counts of neurons.

The depth-aware rule is DART's (arXiv 2601.22632, layer-wise allocation), nine steps from a layer's
sensitivity to its prune ratio. Steps 3 to 8 are `depth_aware`; step 2 is `normalise_sensitivity`;
step 9 (rounding) is `keep_counts`, which, unlike the published code, meets the budget exactly.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text, write

TABLE_TOLERANCE = 0.005  # of the mean density: published tables are rounded to four digits

EARLY_SHARE, LATE_SHARE = 0.30, 0.15  # w_e, w_l: shares of the depth that count as early and late
EARLY_FACTOR, LATE_FACTOR = 0.25, 0.35  # alpha, beta: how far the first and the last layer are protected
MIN_PRUNE, MAX_PRUNE = 0.10, 0.90  # p_min, p_max
ROUNDS = 10  # of redistribution after clipping
EPS = 1e-6


def check_sparsity(sparsity: float) -> float:
    """The sparsity, if it is a number in [0, 1).

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


def normalise_sensitivity(sensitivity: Sequence[float]) -> list[float]:
    """Min-max normalisation over layers (step 2): 0 for the least sensitive layer, 1 for the most."""
    low, high = min(sensitivity), max(sensitivity)
    return [(s - low) / (high - low + EPS) for s in sensitivity]


def depth_aware(
    normalised_sensitivity: Sequence[float], sparsity: float, protect: bool = True,
    sizes: Sequence[int] | None = None,
) -> list[float]:  # fmt: skip
    """The density of every layer by DART's depth-aware rule.

    Args:
        normalised_sensitivity: [L], 0 (the FFN changes the stream least) to 1 (most).
        sparsity: in [0, 1), over all layers; the mean of the returned densities is 1 - sparsity.
        protect: spare early and late layers (step 4). False is the paper's ablation: a depth factor of 1 everywhere.
        sizes: [L] neurons of every layer, where these differ: the mean is over neurons then (the paper's models have
            layers of one size).

    Returns:
        [L] densities. What is pruned of a layer is kept between 0.1 and 0.9, unless the sparsity itself lies outside
        these bounds (sparsity 0 keeps everything).
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
    """The protection of early and late layers (step 4).

    Args:
        x: the depth of the layer, in [0, 1].

    Returns:
        A factor on what is pruned; 1 protects nothing.
    """
    if x < EARLY_SHARE:
        return EARLY_FACTOR + (1 - EARLY_FACTOR) * x / EARLY_SHARE
    if x > 1 - LATE_SHARE:
        return LATE_FACTOR + (1 - LATE_FACTOR) * (1 - x) / LATE_SHARE
    return 1.0


def keep_counts(ratios: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[int]:
    """The kept neurons of every layer: rounded down, then one more for the largest fractions, so the total is exact.

    Args:
        ratios: [L] densities, meant to satisfy sum(ratio * size) = (1 - sparsity) * sum(size).
        sizes: [L] neurons of every layer.
        sparsity: the labelled sparsity in [0, 1), over all layers.

    Returns:
        [L] counts with sum = round((1 - sparsity) * sum(sizes)), each between 0 and its layer's size.
    """
    exact = [r * n for r, n in zip(ratios, sizes, strict=True)]
    return exact_counts(exact, sizes, round((1.0 - sparsity) * sum(sizes)))


def exact_counts(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers near `wanted`, between 0 and `most`, that sum to `total` (at most sum(most))."""
    if not 0 <= total <= sum(most):
        raise ValueError(f"{total} does not fit between 0 and {sum(most)}")
    # 1e-9: (1 - 0.7) * 10 is 3.0000000000000004 or 2.9999999999999996 by luck; a whole number stays whole.
    exact = [max(0.0, min(w, n)) for w, n in zip(wanted, most, strict=True)]
    counts = [math.floor(e + 1e-9) for e in exact]
    # What misses the total by much (ratios clipped at their bounds) needs more than one pass; good ones need one.
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        open_layers = [i for i, n in enumerate(most) if (counts[i] < n if step > 0 else counts[i] > 0)]
        open_layers.sort(key=lambda i: (step * (counts[i] - exact[i]), i))
        for i in open_layers[: abs(missing)]:
            counts[i] += step
    return counts


def in_steps(counts: Sequence[int], most: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Whole multiples of each layer's step near `counts`, whose sum is not more than theirs.

    What rounding down leaves over makes one step more where most of one is missing; the rest goes to layers whose step
    is 1. So the sum misses that of `counts` by less than one step, and by nothing where such layers have room.

    Args:
        counts: [L]. most: [L] upper bounds, multiples of the steps. steps: [L], 1 where any count will do.
    """
    found = [n - n % s for n, s in zip(counts, steps, strict=True)]
    left = sum(counts) - sum(found)
    for i in sorted(range(len(found)), key=lambda i: (-(counts[i] % steps[i]) / steps[i], i)):
        if counts[i] % steps[i] and steps[i] <= left:
            found[i] += steps[i]
            left -= steps[i]
    any_count = [i for i, s in enumerate(steps) if s == 1]
    left = min(left, sum(most[i] - found[i] for i in any_count))
    if left:
        wanted = [found[i] + left / len(any_count) for i in any_count]
        fitting = exact_counts(wanted, [most[i] for i in any_count], sum(found[i] for i in any_count) + left)
        for i, n in zip(any_count, fitting, strict=True):
            found[i] = n
    return found


@dataclass(frozen=True)
class Prices:
    """What is read of a neuron, in rows of a mean matrix as it is served (a column of down is one of its size).

    Attributes:
        whole: of each one of the mask, before anything is chosen. taken: of each one that is taken, beside that.
        written: of each one that writes, beside that.
        coarse: of each one that writes what an image shows of it; None where nothing does.
        across: of each one there is, in the mask or not, as far as `whole` lacks it.
    """

    whole: float
    taken: float
    written: float = 1.0
    coarse: float | None = None
    across: float = 0.0


def mean_prices(each: Sequence[Prices], weights: Sequence[int]) -> Prices:
    """The mean over the neurons of all layers. weights: [L], of a matrix of each."""
    parts = [n / sum(weights) for n in weights]
    fields = zip(*(dataclasses.astuple(prices) for prices in each), strict=True)
    return Prices(*(sum(p * x for p, x in zip(parts, values, strict=True)) for values in fields))


@dataclass(frozen=True)
class Counts:
    """How many neurons of each layer a token reads, and of which matrices.

    Attributes:
        mask: [L] neurons in the mask.
        taken: [L] those of the mask that a token takes. It reads their rows of every matrix that is not read whole.
        written: [L] those of the taken ones that a token writes. It reads their columns of down.
        whole: how many matrices a token reads for the whole mask; a fraction where it reads an image of them.
    """

    mask: list[int]
    taken: list[int]
    written: list[int]
    whole: float

    def in_steps(self, most: Sequence[int], steps: Sequence[int]) -> Counts:
        """Counts that fit masks in whole steps, such as equally many neurons of each expert: no more than these."""
        mask = in_steps(self.mask, most, steps)
        taken = exact_counts(self.taken, mask, min(sum(self.taken), sum(mask)))
        written = exact_counts(self.written, taken, min(sum(self.written), sum(taken)))
        return Counts(mask, taken, written, self.whole)


def chosen_counts(
    densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, whole: float,
    ratio: float | None, write_share: float, title: str = "the choice", image: Prices | None = None,
) -> Counts:  # fmt: skip
    """How many neurons of every layer a token's choice keeps, at weights read = 1 - sparsity.

    Of a gated FFN whose gate is read whole, a token reads (mask + taken + written) / 3; of a plain one, whose up is
    read whole, (mask + taken) / 2. In general matrices * read = whole * mask + (matrices - 1 - whole) * taken
    + written, and with an image as its prices say. Over all layers this is met to the neuron (never exceeded, where an
    image makes rows count in fractions), and in every layer up to rounding. Where a mask has all
    neurons of its layer, the tokens take more of them instead.

    Args:
        densities: [L] weights read of every layer, mean 1 - sparsity.
        matrices: 3 for gated FFNs and 2 for plain ones. whole: of these, those read for the whole mask; of images of
            them the bytes as a share of a matrix.
        ratio: neurons of the mask as a multiple of the weights read (1 is a mask alone); None: all neurons.
        write_share: written / taken of a gated FFN, as far as the mask has enough neurons to take.
        title: what the choice is called in an error.
        image: what is read through one; `whole` then counts for nothing.

    Raises:
        UserError: what is read whole is more than the sparsity leaves.
    """
    everything, prices = sum(sizes), image or Prices(whole, matrices - 1 - whole)
    kept, unit = round((1.0 - sparsity) * everything), prices.written  # what follows counts columns of down
    if kept == everything:
        return Counts(list(sizes), list(sizes), list(sizes), prices.whole)
    if image is not None:
        _check_most(image, matrices, sparsity, title)
    across = prices.across / unit
    budget, whole, middle = matrices * kept / unit - across * everything, prices.whole / unit, prices.taken / unit
    if ratio is None:
        wanted, mask = [float(n) for n in sizes], list(sizes)
        if whole * everything > budget:
            said = None if image is not None else f"{whole:.4g} of the FFN's {matrices} matrices whole"
            raise _too_much(title, prices.whole / matrices, sparsity, said, ", or a mask that is not everything")
    else:
        wanted, mask = _mask_counts(densities, sizes, kept, matrices, prices, ratio, middle == 1 and write_share == 1)
    masked = sum(mask)
    # At `matrices * density` nothing is left to take.
    left = [(matrices / unit * r - across) * n - whole * w for r, n, w in zip(densities, sizes, wanted, strict=True)]
    rest = budget - whole * masked
    if middle == 0:
        taken = exact_counts(left, mask, min(masked, math.floor(rest)))
        return Counts(mask, taken, taken, prices.whole)
    share = [x / (middle + write_share) for x in left]
    missing = sum(max(0.0, s - m) for s, m in zip(share, mask, strict=True))  # where the mask has fewer to take
    some = max(math.ceil(rest / (middle + write_share) - missing), math.ceil(rest / (middle + 1)))
    most_taken = min(masked, math.floor(rest / middle), some)
    taken = exact_counts(share, mask, most_taken)
    unwritten = [x - middle * min(s, m) for x, s, m in zip(left, share, mask, strict=True)]
    written = exact_counts(unwritten, taken, min(most_taken, math.floor(rest - middle * most_taken)))
    return Counts(mask, taken, written, prices.whole)


def graded_counts(
    densities: Sequence[float], sizes: Sequence[int], sparsity: float, matrices: int, prices: Prices, ratio: float,
    title: str = "the choice",
) -> Counts:  # fmt: skip
    """How many neurons of every layer are taken exactly, and how many write, some of them as an image shows them.

    matrices * read = whole * all + (taken + written) * taken neurons + coarse * other neurons that write. It is never
    exceeded, and by less than a neuron not met.

    Args:
        densities: [L] weights read of every layer, mean 1 - sparsity. sizes: [L] neurons of every layer.
        matrices: 3 for gated FFNs and 2 for plain ones. prices: what is read of a neuron.
        ratio: neurons that write as an image shows them, as a multiple of those that are taken.
        title: what the choice is called in an error.

    Returns:
        `written` counts all that write: those taken too.

    Raises:
        UserError: the image takes more than the sparsity leaves.
    """
    everything, coarse = sum(sizes), prices.coarse
    assert coarse is not None
    before = prices.whole + prices.across  # of each neuron
    budget = matrices * round((1.0 - sparsity) * everything) - before * everything
    if sparsity == 0:
        return Counts(list(sizes), list(sizes), list(sizes), prices.whole)
    if budget < 0:
        raise _too_much(title, before / matrices, sparsity)
    _check_most(prices, matrices, sparsity, title)
    exact = prices.taken + prices.written
    wanted = []
    for density, n in zip(densities, sizes, strict=True):
        left = max(0.0, (matrices * density - before) * n)
        few = left / (exact + ratio * coarse)
        wanted.append(few if few * (1 + ratio) <= n else min(float(n), (left - coarse * n) / (exact - coarse)))
    taken = exact_counts(wanted, sizes, min(everything, math.floor(sum(wanted) + 1e-9), math.floor(budget / exact)))
    rest = budget - exact * sum(taken)
    writing = [min(float(n), t + ratio * w) for n, t, w in zip(sizes, taken, wanted, strict=True)]
    more = [n - t for n, t in zip(sizes, taken, strict=True)]
    others = exact_counts(
        [w - t for w, t in zip(writing, taken, strict=True)], more, min(sum(more), math.floor(rest / coarse))
    )
    return Counts(list(sizes), taken, [t + o for t, o in zip(taken, others, strict=True)], prices.whole)


def _check_most(prices: Prices, matrices: int, sparsity: float, title: str) -> None:
    """Refuse a sparsity at which all that there is to read is less than is to be read: weights are served in few bits.

    Raises:
        UserError: with the lowest sparsity.
    """
    most = (prices.whole + prices.across + prices.taken + prices.written) / matrices
    if 1 - sparsity > most + 1e-9:
        raise UserError(
            f"{title} reads FFN weights in few bits, {most:.3g} of their bytes if it reads all, and sparsity "
            f"{sparsity:g} asks for {1 - sparsity:.3g}",
            f"use a sparsity from {math.ceil(100 * (1 - most)) / 100:g}, or 0 for the model as it is",
        )


def _too_much(title: str, share: float, sparsity: float, said: str | None = None, other: str = "") -> UserError:
    """What is read before anything is chosen is more than the sparsity leaves.

    Args:
        share: of the FFN's bytes, that is read. said: what it is, if no image. other: a remedy beside a lower sparsity.
    """
    said = said or f"an image that takes {share:.3g} of the FFN's bytes"
    return UserError(
        f"{title} reads {said}, which is more than sparsity {sparsity:g} leaves",
        f"use a sparsity up to {math.floor(100 * (1 - share)) / 100:g}{other}",
    )


def _mask_counts(
    densities: Sequence[float], sizes: Sequence[int], kept: int, matrices: int, prices: Prices, ratio: float, even: bool
) -> tuple[list[float], list[int]]:
    """The neurons of every layer's mask: as wanted, and in whole numbers.

    Args:
        even: whether what is left must divide among two matrices. See `chosen_counts` for the others.
    """
    whole = prices.whole
    most = matrices / whole if whole else math.inf
    wanted = [min(ratio * r, 1.0, most * r) * n for r, n in zip(densities, sizes, strict=True)]
    clipped = sum(ratio * r * n - w for r, n, w in zip(densities, sizes, wanted, strict=True))
    budget = matrices * kept - prices.across * sum(sizes)
    limit = min(sum(sizes), math.floor(budget / whole)) if whole else sum(sizes)
    masked = max(kept, min(limit, round(ratio * kept - clipped)))
    if even:
        masked = max(kept, masked - round(whole * masked - budget) % 2)
    return wanted, exact_counts(wanted, sizes, masked)


def read_table(path: str | Path) -> list[float]:
    """The densities of a saved allocation (`write_table`), [L].

    Raises:
        UserError: the file cannot be read, or holds no ratios.
    """
    remedy = "write one with `dart-eval trace --save-allocation FILE`"
    try:
        data = json.loads(read_text(path, "allocation table", remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"allocation table {path} cannot be read ({error})", remedy) from None
    ratios = data.get("keep") if isinstance(data, dict) else None
    if (
        not isinstance(ratios, list)
        or not ratios
        or not all(isinstance(r, (int, float)) and 0 <= r <= 1 for r in ratios)
    ):
        raise UserError(f"{path} is no allocation table: it needs `keep`, a list of ratios in [0, 1]", remedy)
    return [float(r) for r in ratios]


def write_table(path: str | Path, ratios: Sequence[float], **about: object) -> None:
    """Save densities, with what made them, for `allocation=table:allocation.file=FILE`."""
    text = json.dumps({**about, "keep": [round(float(r), 6) for r in ratios]}, indent=1) + "\n"
    write(path, text)


def check_table(ratios: Sequence[float], sparsity: float, layers: int | None = None) -> None:
    """Refuse a table that was made for another sparsity, or for another model where its `layers` are known.

    Raises:
        UserError: it has another number of layers, or another mean.
    """
    if layers is not None and len(ratios) != layers:
        raise UserError(f"the allocation table has {len(ratios)} layers, the model {layers}", "make one for this model")
    mean = sum(ratios) / len(ratios)
    if abs(mean - (1 - sparsity)) > TABLE_TOLERANCE:
        raise UserError(
            f"the allocation table keeps {mean:.3f} of the neurons, sparsity {sparsity:g} keeps {1 - sparsity:.3f}",
            f"run it at --sparsity {1 - mean:.3g}, or make a table for {sparsity:g}",
        )
