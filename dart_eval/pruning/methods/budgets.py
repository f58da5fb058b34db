"""TEAL's greedy budgets: how much each matrix of a layer leaves out, at the layer's sparsity (arXiv 2408.14690).

    while the mean over a layer's matrices is below the sparsity:
        of gate, up and down, let that leave out .05 more with which the FFN's output changes least

A change is the norm over tokens of what is written less, the mean over features. As in the authors' code
(FasterDecoding/TEAL, 5baaec8, `teal/greedyopt.py`) each layer has the same sparsity, sees dense inputs, and is judged
by the last quarter of its sequences. There attention's matrices are in the search, steps are of .05 of the size of q,
and sequences are 2048 tokens of Alpaca; here they are the passages of the calibration text, as many as give `TOKENS`
tokens, and the last step is cut, so that the sparsity is met.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import bias_of
from dart_eval.pruning.calibration import Calibration

STEP, LAST, TOKENS = 0.05, 0.25, 512
Keep = Callable[[int, int, Tensor, int], Tensor]


@torch.no_grad()
def greedy(ffns: Sequence[FFN], sparsity: float, calibration: Calibration, keep: Keep) -> list[list[float]]:
    """Return the share of its columns that each matrix leaves out, per layer and matrix, down last.

    Args:
        sparsity: the mean over the matrices of each layer.
        keep: layer, matrix, its inputs [T, n], count -> [T, n] bool, the columns that tokens read.
    """
    seen: list[list[Tensor]] = [[] for _ in ffns]

    def see(layer: int, x: Tensor, _h: Tensor) -> None:
        if sum(map(len, seen[layer])) < TOKENS:
            seen[layer].append(x[int(len(x) * (1 - LAST)) :].clone())

    calibration.visit(see)
    inputs = [torch.cat(parts)[:TOKENS] for parts in seen]
    return [_of_layer(f, x, sparsity, keep) for f, x in zip(ffns, inputs, strict=True)]


def _of_layer(ffn: FFN, x: Tensor, sparsity: float, keep: Keep) -> list[float]:
    products = _products(ffn)

    def product(i: int, values: Tensor, left_out: float) -> Tensor:
        count = round((1 - left_out) * values.shape[-1])
        return products[i](values * keep(ffn.layer, i, values, count) if left_out else values)

    @functools.cache  # most candidates have those of the one before
    def of_x(i: int, left_out: float) -> Tensor:
        return product(i, x, left_out)

    def written(left_out: Sequence[float]) -> Tensor:
        """Return what the FFN writes, [T, D]. left_out: per matrix."""
        *first, last = left_out
        gate, *up = (of_x(i, share) for i, share in enumerate(first))
        return product(len(first), ffn.act(gate) * ffn.lifted(up[0]) if up else ffn.act(gate), last)

    shares, rest = [0.0] * ffn.matrices, sparsity * ffn.matrices
    dense = written(shares)
    while rest > 1e-9:
        step, tried = min(STEP, rest), []
        for i, share in enumerate(shares):
            if share + step <= 1 + 1e-9:
                more = [*shares[:i], share + step, *shares[i + 1 :]]
                tried.append((float((dense - written(more)).float().norm(dim=0).mean()), i))
        _, best = min(tried)
        shares[best] += step
        rest -= step
    return shares


def _products(ffn: FFN) -> list[Callable[[Tensor], Tensor]]:
    """Return the products of an FFN's matrices, gate and up apart."""
    biases = [bias_of(m) for m in ffn.projections]
    if ffn.fused:
        biases[:1] = [None, None] if biases[0] is None else list(biases[0].chunk(2))
    weights = [*ffn.input_weights(), ffn.output_weight()]
    return [lambda v, w=w, b=b: linear(v, w, b) for w, b in zip(weights, biases, strict=True)]  # type: ignore[misc]
