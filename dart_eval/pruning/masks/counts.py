"""From densities of layers to exact counts of neurons: a sparsity is met to the neuron."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from dart_eval.util.errors import UserError


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
class ReadCost:
    """The bytes that a token reads of a neuron, in rows of a mean matrix as it is served (a column of down is one).

    Attributes:
        always: of every neuron, in the mask or not, as far as `in_mask` lacks it.
        in_mask: of each neuron of the mask, before anything is chosen. taken, written: of each one that is taken or
            written, beside that.
        approximated: of each one that writes what its preview has of it; None where none does.
    """

    in_mask: float
    taken: float
    written: float = 1.0
    approximated: float | None = None
    always: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What tokens may read.

    Attributes:
        densities: [L] share of each layer's weights that is read, mean 1 - sparsity. sizes: [L] neurons of every layer.
        matrices: 3 for gated FFNs and 2 for plain ones. whole_mask: the mask is of everything.
        prices: what is read of a neuron, where there is a preview.
    """

    densities: Sequence[float]
    sizes: Sequence[int]
    sparsity: float
    matrices: int
    whole_mask: bool = True
    prices: ReadCost | None = None


def mean_cost(each: Sequence[ReadCost], weights: Sequence[int]) -> ReadCost:
    """The mean over the neurons of all layers. weights: [L], of a matrix of each."""
    parts = [n / sum(weights) for n in weights]
    fields = zip(*(dataclasses.astuple(prices) for prices in each), strict=True)
    return ReadCost(*(sum(p * x for p, x in zip(parts, values, strict=True)) for values in fields))


@dataclass(frozen=True)
class Counts:
    """How many neurons of each layer a token reads, and of which matrices.

    Attributes:
        mask: [L] neurons in the mask.
        taken: [L] those of the mask that a token takes. It reads their rows of every matrix that is not read whole.
        written: [L] those of the taken ones that a token writes. It reads their columns of down.
        full_matrices: how many matrices a token reads for the whole mask; a fraction where it reads a preview of them.
    """

    mask: list[int]
    taken: list[int]
    written: list[int]
    full_matrices: float

    def in_steps(self, most: Sequence[int], steps: Sequence[int]) -> Counts:
        """Counts that fit masks in whole steps, such as equally many neurons of each expert: no more than these."""
        mask = in_steps(self.mask, most, steps)
        taken = exact_counts(self.taken, mask, min(sum(self.taken), sum(mask)))
        written = exact_counts(self.written, taken, min(sum(self.written), sum(taken)))
        return Counts(mask, taken, written, self.full_matrices)


def chosen_counts(
    allowed: Budget, whole: float, ratio: float | None, write_share: float, title: str = "the choice"
) -> Counts:
    """How many neurons of every layer a token's choice keeps, at weights read = 1 - sparsity.

    Of a gated FFN whose gate is read whole, a token reads (mask + taken + written) / 3; of a plain one, whose up is
    read whole, (mask + taken) / 2. In general matrices * read = whole * mask + (matrices - 1 - whole) * taken
    + written, and with an image as its prices say. Over all layers this is met to the neuron (never exceeded, where an
    image makes rows count in fractions), and in every layer up to rounding. Where a mask has all
    neurons of its layer, the tokens take more of them instead.

    Args:
        whole: matrices that are read for the whole mask; where there is a preview, its prices count in their place.
        ratio: neurons of the mask as a multiple of the weights read (1 is a mask alone); None: all neurons.
        write_share: written / taken of a gated FFN, as far as the mask has enough neurons to take.
        title: what the choice is called in an error.

    Raises:
        UserError: what is read whole is more than the sparsity leaves.
    """
    densities, sizes, sparsity, matrices, image = (
        allowed.densities, allowed.sizes, allowed.sparsity, allowed.matrices, allowed.prices,
    )  # fmt: skip
    everything, prices = sum(sizes), image or ReadCost(whole, matrices - 1 - whole)
    kept, unit = round((1.0 - sparsity) * everything), prices.written  # what follows counts columns of down
    if kept == everything:
        return Counts(list(sizes), list(sizes), list(sizes), prices.in_mask)
    if image is not None:
        check_most(image, matrices, sparsity, title)
    always = prices.always / unit
    budget, in_mask, middle = matrices * kept / unit - always * everything, prices.in_mask / unit, prices.taken / unit
    if ratio is None:
        wanted, mask = [float(n) for n in sizes], list(sizes)
        if in_mask * everything > budget:
            said = None if image is not None else f"{in_mask:.4g} of the FFN's {matrices} matrices whole"
            raise too_much(title, prices.in_mask / matrices, sparsity, said, ", or a mask that is not everything")
    else:
        wanted, mask = _mask_counts(densities, sizes, kept, matrices, prices, ratio, middle == 1 and write_share == 1)
    masked = sum(mask)
    # At `matrices * density` nothing is left to take.
    left = [(matrices / unit * r - always) * n - in_mask * w for r, n, w in zip(densities, sizes, wanted, strict=True)]
    rest = budget - in_mask * masked
    if middle == 0:
        taken = exact_counts(left, mask, min(masked, math.floor(rest)))
        return Counts(mask, taken, taken, prices.in_mask)
    share = [x / (middle + write_share) for x in left]
    missing = sum(max(0.0, s - m) for s, m in zip(share, mask, strict=True))  # where the mask has fewer to take
    some = max(math.ceil(rest / (middle + write_share) - missing), math.ceil(rest / (middle + 1)))
    most_taken = min(masked, math.floor(rest / middle), some)
    taken = exact_counts(share, mask, most_taken)
    unwritten = [x - middle * min(s, m) for x, s, m in zip(left, share, mask, strict=True)]
    written = exact_counts(unwritten, taken, min(most_taken, math.floor(rest - middle * most_taken)))
    return Counts(mask, taken, written, prices.in_mask)


def check_most(prices: ReadCost, matrices: int, sparsity: float, title: str) -> None:
    """Refuse a sparsity at which all that there is to read is less than is to be read: weights are served in few bits.

    Raises:
        UserError: with the lowest sparsity.
    """
    most = (prices.in_mask + prices.always + prices.taken + prices.written) / matrices
    if 1 - sparsity > most + 1e-9:
        raise UserError(
            f"{title} reads FFN weights in few bits, {most:.3g} of their bytes if it reads all, and sparsity "
            f"{sparsity:g} asks for {1 - sparsity:.3g}",
            f"use a sparsity from {math.ceil(100 * (1 - most)) / 100:g}, or 0 for the model as it is",
        )


def too_much(title: str, share: float, sparsity: float, said: str | None = None, other: str = "") -> UserError:
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
    densities: Sequence[float], sizes: Sequence[int], kept: int, matrices: int, prices: ReadCost, ratio: float,
    even: bool,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """The neurons of every layer's mask: as wanted, and in whole numbers.

    Args:
        even: whether what is left must divide among two matrices. See `chosen_counts` for the others.
    """
    in_mask = prices.in_mask
    most = matrices / in_mask if in_mask else math.inf
    wanted = [min(ratio * r, 1.0, most * r) * n for r, n in zip(densities, sizes, strict=True)]
    clipped = sum(ratio * r * n - w for r, n, w in zip(densities, sizes, wanted, strict=True))
    budget = matrices * kept - prices.always * sum(sizes)
    limit = min(sum(sizes), math.floor(budget / in_mask)) if in_mask else sum(sizes)
    masked = max(kept, min(limit, round(ratio * kept - clipped)))
    if even:
        masked = max(kept, masked - round(in_mask * masked - budget) % 2)
    return wanted, exact_counts(wanted, sizes, masked)
