"""A choice by a preview that saves time: the image is multiplied as codes, and only chosen rows are read.

For one token of one sequence, without a mask. The image of gate and up gives the expected h^2 of every neuron, as under
`masked` execution. Rows of gate and up of the largest are read exactly, and rows of down with the largest |h| are
summed. The image is a 4-bit copy, multiplied by torch's packed product on a CPU and by a kernel on a GPU
(`image_kernels`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from dart_eval.kernels import gather
from dart_eval.kernels.chosen import ChosenRows, best
from dart_eval.kernels.image_kernels import CopyCodes
from dart_eval.kernels.products import grouped, grouping, product
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.images import Copy, Image
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.choices.preview import Previewing
from dart_eval.pruning.choices.previews import biases, row_error
from dart_eval.util.bits import Rounding
from dart_eval.weights.rounding import Served, rounded, served_inputs

DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # of x, in torch's packed products
PART_BYTES = 1 << 19  # of rows that a CPU copies before it multiplies them, so that they stay in its cache
WHOLE = 0.45  # share of the rows above which a CPU multiplies all of them faster, since copied rows take twice the time


def lacking(choice: Previewing, ffn: FFN) -> str | None:
    """Return why no product here takes the image of a choice as codes, or None. ffn: gated, with plain weights."""
    image, kernels = choice.image, gather.missing(device_of(ffn)) is None
    dtypes, possible = {m.weight.dtype for m in served_inputs(ffn)}, False
    if isinstance(image, Copy):
        grouped = kernels or grouping(Rounding(image.bits, image.group), ffn.width) is not None
        possible = image.bits == 4 and grouped and dtypes <= DTYPES
    return None if possible else f"nothing here multiplies {image.title} of {' and '.join(map(str, dtypes))}"


@dataclass(frozen=True)
class CodedPreview(Preview):
    """The images of one layer as codes alone.

    Attributes:
        products: of gate and up, x -> [..., F].
    """

    products: tuple[Callable[[Tensor], Tensor], ...] = ()

    def project(self, x: Tensor) -> list[Tensor]:
        return [multiply(x) for multiply in self.products]


_CACHE: WeightCache[CodedPreview] = WeightCache()


@torch.no_grad()
def coded(image: Image, ffn: FFN) -> CodedPreview:
    """Return the image of a layer's gate and up as codes, cached for the next session.

    Its products differ from those of the image as a matrix (`previews`) by the rounding of 16-bit sums and scales.
    """
    matrices, kernels = served_inputs(ffn), gather.missing(device_of(ffn)) is None

    def make() -> CodedPreview:
        own = biases(ffn)
        pairs = [_coded(image, m, b, kernels) for m, b in zip(matrices, own, strict=True)]
        products, row_errors = zip(*pairs, strict=True)
        return CodedPreview((), own, row_errors, ffn.act, lift=ffn.lift, products=products)

    return _CACHE.get(ffn.up, [m.weight for m in matrices], (image, kernels), make)


def _coded(image: Image, matrix: Served, bias: Tensor | None, kernels: bool) -> tuple[object, Tensor]:
    """Return the product with the image of one matrix, and the error of each row."""
    weight = matrix.weight
    assert isinstance(image, Copy)
    held = rounded(weight, Rounding(image.bits, image.group))
    multiply = functools.partial(_product_of_token, CopyCodes.of(held).times, bias) if kernels else None
    return multiply or product(grouped(held), bias, weight.dtype), row_error(matrix, held.values.to(weight.dtype))


def _product_of_token(multiply: Callable[[Tensor], Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the product of one token with an image: [..., D] -> [..., F]. multiply: [D] -> [F] fp32."""
    out = multiply(x.flatten())
    return (out if bias is None else out + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


class PreviewedRows(ChosenRows):
    """One FFN of which a token reads an image, and then only the weights of the neurons that it takes.

    All neurons are in the mask; only down is copied, by neurons. Gate and up return the taken neurons alone, in the
    order of their rows, and so does h.
    """

    def __init__(self, ffn: FFN, choice: Previewing) -> None:
        super().__init__(ffn)
        self._slots = []
        self.rows = self._down_rows.contiguous()
        self.choice, self.image = choice, choice.image
        self.preview = coded(choice.image, ffn)

    def select(self, mask: Tensor) -> int:
        return 0

    @property
    def rows_read(self) -> tuple[float, ...]:
        size, width, image, rows = self.ffn.size, self.ffn.width, self.image, self.ffn.size if self._all else self.taken
        gate, up = (
            (image.bits_of(m.stored, size, width) * size + m.stored.total * rows) / m.stored.total
            for m in served_inputs(self.ffn)
        )
        return gate, up, self.written

    @property
    def _all(self) -> bool:
        """Whether all rows of gate and up are multiplied, because that is faster."""
        return not self.kernels and self.taken > WHOLE * self.ffn.size

    def _choose(self, x: Tensor) -> Tensor:
        preview, expected = self.preview.look(*self.choice.parts_of(x, None))
        token = Token(preview, preview, preview, None, preview=preview, expected=expected)
        self._taken = best(self.choice.importance(token).flatten(), self.taken)
        return self._exactly(0, x)

    def _rest(self, x: Tensor) -> Tensor:
        return self._exactly(1, x)

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten())

    def _exactly(self, matrix: int, x: Tensor) -> Tensor:
        """Return the product with the taken rows, [..., taken]. matrix: 0 for gate, 1 for up."""
        module = self._modules[matrix]
        weight, bias, flat, rows = module.weight, module.bias, x.reshape(1, -1), self._taken
        if self.kernels:
            out = self.kernels.read_rows(weight, rows, flat[0])
            out = (out if bias is None else out + bias[rows].float()).to(x.dtype)
        elif self._all:
            out = linear(flat, weight, bias)[:, rows]
        else:
            parts = rows.split(max(1, PART_BYTES // (weight.shape[1] * weight.element_size())))
            out = torch.cat([
                linear(flat, weight.index_select(0, part), None if bias is None else bias[part]) for part in parts
            ], dim=-1)  # fmt: skip
        return out.view(*x.shape[:-1], -1)
