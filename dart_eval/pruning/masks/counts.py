"""From densities of layers to exact counts of neurons: a sparsity is met to the neuron."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
class ReadCost:
    """The bytes that a token reads of a neuron, in rows of an average served matrix (a column of down is one row).

    Attributes:
        in_mask: per neuron of the mask, before the choice.
        taken: in addition, per taken neuron.
        written: in addition, per written neuron.
        approximated: per neuron that writes its previewed value; None if none does.
        always: per neuron, in the mask or not, beside `in_mask`.
    """

    in_mask: float
    taken: float
    written: float = 1.0
    approximated: float | None = None
    always: float = 0.0


class Budget(NamedTuple):
    """The bytes that tokens may read.

    Attributes:
        densities: [L] share of each layer's weights that is read, with mean 1 - sparsity.
        sizes: [L] neurons per layer.
        matrices: 3 for gated FFNs, 2 for plain ones.
        whole_mask: whether the mask holds every neuron.
        read_cost: read cost of a neuron, if there is a preview.
    """

    densities: Sequence[float]
    sizes: Sequence[int]
    sparsity: float
    matrices: int
    whole_mask: bool = True
    read_cost: ReadCost | None = None


def mean_cost(each: Sequence[ReadCost], weights: Sequence[int]) -> ReadCost:
    """Return the mean read cost over layers. weights: [L], size of a matrix of each layer."""
    parts = [n / sum(weights) for n in weights]
    fields = zip(*(dataclasses.astuple(read_cost) for read_cost in each), strict=True)
    return ReadCost(*(sum(p * x for p, x in zip(parts, values, strict=True)) for values in fields))


@dataclass(frozen=True)
class Counts:
    """Counts of the neurons that a token reads, per layer.

    Attributes:
        mask: [L] neurons in the mask.
        taken: [L] neurons of the mask that a token takes. It reads their rows of every matrix not read in full.
        written: [L] taken neurons that a token writes. It reads their columns of down.
        full_matrices: matrices that a token reads for the whole mask; a fraction for a preview.
    """

    mask: list[int]
    taken: list[int]
    written: list[int]
    full_matrices: float

    def in_steps(self, most: Sequence[int], steps: Sequence[int]) -> Counts:
        """Return counts, at most these, of masks in whole steps, such as equally many neurons of each expert."""
        mask = in_steps(self.mask, most, steps)
        taken = exact_counts(self.taken, mask, min(sum(self.taken), sum(mask)))
        written = exact_counts(self.written, taken, min(sum(self.written), sum(taken)))
        return Counts(mask, taken, written, self.full_matrices)


def chosen_counts(
    allowed: Budget, full_matrices: float, ratio: float | None, write_share: float, title: str = "the choice"
) -> Counts:
    """Return the neurons per layer that a token's choice reads, at weights read = 1 - sparsity.

    A gated FFN whose gate is read in full reads (mask + taken + written) / 3; a plain one, whose up is read in full,
    (mask + taken) / 2. In general matrices * read = full * mask + (matrices - 1 - full) * taken + written, and with a
    preview its read cost. The total over layers is exact to the neuron (with a preview, whose rows count in fractions,
    never exceeded), and each layer is right up to rounding. If a mask holds its whole layer, tokens take more of it.

    Args:
        full_matrices: matrices that are read for the whole mask. A preview's read cost replaces it.
        ratio: neurons of the mask, as a multiple of those that a mask alone would have; None: all neurons.
        write_share: written / taken of a gated FFN, if the mask has enough neurons to take.
        title: the choice in an error message.

    Raises:
        UserError: what is read before the choice exceeds what the sparsity leaves.
    """
    densities, sizes, sparsity, matrices, _, preview = allowed
    everything, cost = sum(sizes), preview or ReadCost(full_matrices, matrices - 1 - full_matrices)
    n_kept, unit = round((1.0 - sparsity) * everything), cost.written  # from here on in columns of down
    if n_kept == everything:
        return Counts(list(sizes), list(sizes), list(sizes), cost.in_mask)
    if preview is not None:
        check_most(preview, matrices, sparsity, title)
    always, in_mask, middle = cost.always / unit, cost.in_mask / unit, cost.taken / unit
    budget = matrices * n_kept / unit - always * everything
    if budget < 0:
        always = cost.always / matrices
        raise too_much(title, always, sparsity, f"the scales of down, {always:.3g} of the FFN's bytes,")
    if ratio is None:
        wanted, mask = [float(n) for n in sizes], list(sizes)
        if in_mask * everything > budget:
            reads = None if preview is not None else f"{in_mask:.4g} of the FFN's {matrices} matrices whole"
            raise too_much(title, cost.in_mask / matrices, sparsity, reads, ", or a mask that is not everything")
    else:
        wanted, mask = _mask_counts(densities, sizes, n_kept, matrices, cost, ratio, middle == 1 and write_share == 1)
    masked = sum(mask)
    # At `matrices * density` nothing is left to take.
    room = [(matrices / unit * r - always) * n - in_mask * w for r, n, w in zip(densities, sizes, wanted, strict=True)]
    rest = max(0.0, budget - in_mask * masked)  # a rounding error may leave less than nothing
    if middle == 0:
        taken = exact_counts(room, mask, min(masked, math.floor(rest)))
        return Counts(mask, taken, taken, cost.in_mask)
    share = [x / (middle + write_share) for x in room]
    missing = sum(max(0.0, s - m) for s, m in zip(share, mask, strict=True))  # more than the mask has
    some = max(math.ceil(rest / (middle + write_share) - missing), math.ceil(rest / (middle + 1)))
    most_taken = min(masked, math.floor(rest / middle), some)
    taken = exact_counts(share, mask, most_taken)
    unwritten = [x - middle * min(s, m) for x, s, m in zip(room, share, mask, strict=True)]
    written = exact_counts(unwritten, taken, min(most_taken, math.floor(rest - middle * most_taken)))
    return Counts(mask, taken, written, cost.in_mask)


def check_most(read_cost: ReadCost, matrices: int, sparsity: float, title: str) -> None:
    """Refuse a sparsity that asks for more bytes than the low-bit weights have.

    Raises:
        UserError: names the lowest possible sparsity.
    """
    most = (read_cost.in_mask + read_cost.always + read_cost.taken + read_cost.written) / matrices
    if 1 - sparsity > most + 1e-9:
        raise UserError(
            f"{title} reads FFN weights in few bits, {most:.3g} of their bytes if it reads all, and sparsity "
            f"{sparsity:g} asks for {1 - sparsity:.3g}",
            f"use a sparsity from {math.ceil(100 * (1 - most)) / 100:g}, or 0 for the model as it is",
        )


def too_much(title: str, share: float, sparsity: float, reads: str | None = None, other: str = "") -> UserError:
    """Return the error for a choice that reads more before it chooses than the sparsity leaves.

    Args:
        share: share of the FFN's bytes that it reads.
        reads: what it reads; None: an image.
        other: a remedy beside a lower sparsity.
    """
    reads = reads or f"a preview that takes {share:.3g} of the FFN's bytes"
    return UserError(
        f"{title} reads {reads}, which is more than sparsity {sparsity:g} leaves",
        f"use a sparsity up to {math.floor(100 * (1 - share)) / 100:g}{other}",
    )


def _mask_counts(
    densities: Sequence[float], sizes: Sequence[int], n_kept: int, matrices: int, read_cost: ReadCost, ratio: float,
    even: bool,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """Return the neurons of every layer's mask: as wanted, and in whole numbers.

    Args:
        n_kept: neurons that a mask alone would keep.
        even: whether the rest must divide among two matrices. See `chosen_counts` for the others.
    """
    in_mask = read_cost.in_mask
    most = matrices / in_mask if in_mask else math.inf
    each = in_mask + read_cost.taken + read_cost.written  # with a preview less than the matrices
    least = math.ceil((matrices * n_kept - read_cost.always * sum(sizes)) / each - 1e-9)
    ratio = max(ratio, min(least, sum(sizes)) / n_kept) if n_kept else ratio
    wanted = [min(ratio * r, 1.0, most * r) * n for r, n in zip(densities, sizes, strict=True)]
    clipped = sum(ratio * r * n - w for r, n, w in zip(densities, sizes, wanted, strict=True))
    budget = matrices * n_kept - read_cost.always * sum(sizes)
    limit = min(sum(sizes), math.floor(budget / in_mask)) if in_mask else sum(sizes)
    masked = min(limit, max(n_kept, least, round(ratio * n_kept - clipped)))
    if even:
        masked = max(min(n_kept, masked), masked - round(in_mask * masked - budget) % 2)
    return wanted, exact_counts(wanted, sizes, masked)
