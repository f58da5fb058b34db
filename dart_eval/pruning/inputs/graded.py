"""Columns in graded bits at work on a model (`columns.GradedColumns`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.serving import Decoded
from dart_eval.util.bits import OWN_BITS
from dart_eval.weights.rounding import parameter_of, rounded

if TYPE_CHECKING:
    from dart_eval.pruning.inputs.columns import GradedColumns

_CACHE: WeightCache[list[GradedMatrix]] = WeightCache()


class GradedInputs:
    """The part attached to a model, before any prompt.

    Args:
        densities: per layer, the share of its bytes that a token reads.

    Attributes:
        swapped: None, as no weights change (see `attached.AttachedInputs`).
    """

    swapped = None

    @torch.no_grad()
    def __init__(self, part: GradedColumns, ffns: Sequence[FFN], densities: Sequence[float]) -> None:
        self.ffns = ffns
        self.layers = [
            [(m, _matrices(part, m, 2 if f.fused and m is not f.down else 1, d)) for m in f.projections]
            for f, d in zip(ffns, densities, strict=True)
        ]

    def nbytes(self) -> int:
        """Return the bytes beside the model: what steps save. Codes stand in place of the weights."""
        return sum(one.gains.nbytes for layer in self.layers for _, matrices in layer for one in matrices)

    def watch(self, add: Callable[[RemovableHandle], None], forward: object) -> None:
        """Install the hooks that replace the products of decoded tokens.

        Args:
            add: called with the handle of each hook.
            forward: the current forward (`hooks.Forward`).
        """
        for ffn, layer in zip(self.ffns, self.layers, strict=True):
            for module, matrices in layer:
                add(module.register_forward_hook(_graded(ffn, matrices, forward)))


class GradedMatrix:
    """A matrix of which tokens read columns in graded bits.

    Args:
        part: the rule. weight: [out, n]. bias: [out]; None. share: of the bytes of 16-bit weights, which a token reads.
    """

    def __init__(self, part: GradedColumns, weight: Tensor, bias: Tensor | None, share: float) -> None:
        self.part, self.bias, (self.rows, self.width) = part, bias, weight.shape
        part.check_read(share, self.width)
        self.scale = part.scale(self.width)
        self.bits = int(self.width * (OWN_BITS * share - self.scale) + 1e-9)
        packed = rounded(weight, part.rounding)
        self.values = [Decoded(packed, weight.dtype, bits) if bits else None for bits in part.bits]
        self.gains = part.gains(part.errors(weight, packed))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product, [..., out], and the bits that a row takes, [...] fp64. x: [..., n]."""
        chosen = self.part.chosen(x, self.gains.to(x.device), self.bits)
        bits = torch.tensor(self.part.bits, device=x.device)[chosen].sum(-1, dtype=torch.float64)
        out: Any = 0.0
        for level, values in enumerate(self.values):
            if values is not None:
                product = nn.functional.linear(x * (chosen == level), values())
                out = out + product.to(torch.promote_types(product.dtype, torch.float32))
        return (out if self.bias is None else out + self.bias), bits + self.width * self.scale


def _matrices(part: GradedColumns, module: nn.Module, parts: int, share: float) -> list[GradedMatrix]:
    """Return the matrices of a projection, cached for the next session. parts: that are stacked in it."""

    def make() -> list[GradedMatrix]:
        bias = bias_of(module)
        biases = [None] * parts if bias is None else bias.chunk(parts)
        weights = plain_matrix(module).chunk(parts)
        return [GradedMatrix(part, w, b, share) for w, b in zip(weights, biases, strict=True)]

    return _CACHE.get(module, [parameter_of(module)], (part, share), make)


def _graded(ffn: FFN, matrices: Sequence[GradedMatrix], forward: Any) -> Callable[..., object]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if forward.phase != "decode" or forward.state is None:
            return None
        made = [(matrix, *matrix(forward.in_batch(args[0]))) for matrix in matrices]
        bits = sum(matrix.rows * of_row.cpu() for matrix, _, of_row in made)
        forward.state.layers[ffn.layer].add_read(bits / (OWN_BITS * ffn.matrices * ffn.width))
        return torch.cat([product for _, product, _ in made], -1).to(output.dtype).view(output.shape)

    return torch.compiler.disable(hook)
