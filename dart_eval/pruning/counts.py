"""From densities of layers to exact counts of neurons, and what these read: a sparsity is met to the neuron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.util.errors import UserError
from dart_eval.weights import rounding

Bits = TypeVar("Bits", float, Tensor)
LINE = 8 * 64  # bits of a line, in which memory is fetched


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


def chosen_counts(
    sizes: Sequence[int], sparsity: float, matrices: int, full_matrices: int, name: str
) -> tuple[list[int], list[int]]:
    """Return the neurons per layer that a token's choice takes and writes, at weights read = 1 - sparsity.

    A gated FFN whose gate is read whole reads (all + taken + written) / 3; a plain one, whose up is read whole,
    (all + taken) / 2. In general matrices * read = full * all + (matrices - 1 - full) * taken + written. The total over
    layers is exact to the neuron, and each layer is right up to rounding.

    Args:
        sizes: [L] neurons per layer.
        matrices: 3 for gated FFNs, 2 for plain ones.
        full_matrices: matrices that are read whole before the choice.
        name: the method in an error message.

    Raises:
        UserError: what is read before the choice exceeds what the sparsity leaves.
    """
    everything, middle = sum(sizes), matrices - 1 - full_matrices
    n_kept = round((1.0 - sparsity) * everything)
    rest = matrices * n_kept - full_matrices * everything
    if n_kept == everything:
        return [*sizes], [*sizes]
    if rest < 0:
        raise UserError(
            f"{name} reads {full_matrices} of the FFN's {matrices} matrices whole, which is more than sparsity "
            f"{sparsity:g} leaves",
            f"use a sparsity up to {math.floor(100 * (1 - full_matrices / matrices)) / 100:g}",
        )
    room = [matrices * (1 - sparsity) * n - full_matrices * n for n in sizes]
    if middle == 0:
        taken = exact_counts(room, sizes, rest)
        return taken, taken
    share = [x / (middle + 1) for x in room]
    most_taken = min(rest // middle, math.ceil(rest / (middle + 1)))
    taken = exact_counts(share, sizes, most_taken)
    wanted = [x - middle * s for x, s in zip(room, share, strict=True)]
    return taken, exact_counts(wanted, taken, min(most_taken, rest - middle * most_taken))


def in_lines(bits: Bits) -> Bits:
    """Return the bits of the lines that hold a piece of memory, which begins one. bits: of the piece."""
    return -((1e-6 - bits) // LINE) * LINE


class NeuronCost:
    """What tokens read, fetch and multiply that take some neurons of each FFN.

    Args:
        sparsity: 0 reads everything, whatever is chosen.
        full_matrices: matrices that a token reads whole before it chooses.

    Attributes:
        counts: [L, 3] long, neurons in the mask, taken by a token and written by it, of a sequence that runs dense.
        neurons: of all FFNs.
    """

    def __init__(self, ffns: Sequence[FFN], sparsity: float, full_matrices: int = 0) -> None:
        self.ffns, self.full = ffns, full_matrices if sparsity else 0
        self.counts = torch.tensor([[f.size] * 3 for f in ffns])
        self._matrices, unit = ffns[0].matrices, rounding.served_bits(ffns)
        self.neurons = sum(f.size for f in ffns)
        self._weights = self._matrices * self.neurons
        terms = []  # rows of an average matrix that a neuron reads: always, in the mask, if taken, if written
        for into, down, scales in map(rounding.bits_per_row, ffns):
            into, down, scales = into / unit, down / unit, scales / unit
            terms.append((scales, into * self.full, into * (self._matrices - 1 - self.full), down - scales))
        self._terms, self._row = torch.tensor(terms, dtype=torch.float64), unit * ffns[0].width

    def read(self, counts: Tensor) -> Tensor:
        """Return the share of the served weight bytes that is read: [B] fp64. counts: [B, L, 3] long."""
        sizes = self.counts[:, :1].expand(len(counts), -1, -1)
        each = torch.cat([sizes, counts], -1).double()  # [B, L, 4]
        return (self._terms * each).sum((1, 2)) / self._weights

    def read_of(self, layer: int, taken: Tensor) -> Tensor:
        """Return the share that tokens read of one FFN which take and write so many neurons: as `taken`, fp64."""
        always, in_mask, take, write = self._terms[layer]
        return ((always + in_mask) * self.ffns[layer].size + (take + write) * taken) / self._weights

    def fetched(self, counts: Tensor, read: float) -> float:
        """Return the share that is fetched. Arguments as of `computed`.

        Whole matrices, and down's scales, lie from end to end. The rows of gate and up that a taken neuron reads lie
        together, and so does its column of down: both begin a line.
        """
        whole = float((self._terms[:, :2] * self.counts[:, :2]).sum()) / self._weights
        pieces = self._terms[:, 2:] * self._row
        bits, lines = (float((each * counts[:, 1:]).sum()) for each in (pieces, in_lines(pieces)))
        return whole + (read - whole) * lines / bits if bits else read

    def computed(self, counts: Tensor, read: float) -> float:
        """Return the share of the weights that a token multiplies. counts: [L, 3], as labelled; read: what it reads."""
        mask, taken, written = counts.double().unbind(-1)
        products = (self.full * mask + (self._matrices - 1 - self.full) * taken + written).sum()
        fixed = (self._terms[:, 0] * self.counts[:, 0]).sum() / self._weights
        moving = (self._terms[:, 1:] * counts).sum() / self._weights
        share = products / self._weights
        return float(share * (read - fixed) / moving if moving else share)
