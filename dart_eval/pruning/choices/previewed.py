"""A token's choice by a preview, so that it saves time: the image is multiplied as codes, chosen rows alone are read.

For one token of one sequence, and without a mask: the image of gate and up says what h^2 is to be expected of every
neuron, as under `masked` execution; the rows of gate and up of the largest are read exactly; those with the largest |h|
are summed from down's rows. The image is a copy of 4 bits, multiplied on a CPU by torch's packed product and on a GPU
by a kernel (`image_kernels`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dart_eval.kernels import gather
from dart_eval.kernels.chosen import ChosenRows, best
from dart_eval.kernels.image_kernels import CopyCodes
from dart_eval.kernels.products import grouped, grouping, product
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.calibration.made import LastMade
from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.images import Copy, Image
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.choices.preview import Previewing
from dart_eval.pruning.choices.previews import biases, doubt
from dart_eval.util.bits import Rounding
from dart_eval.weights.rounding import Served, rounded, served_inputs

DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # of x, in torch's packed products
PART_BYTES = 1 << 19  # of rows that a CPU copies side by side before it multiplies them: so many stay in its cache
WHOLE = 0.45  # of the rows: from here on a CPU multiplies all in less time, since rows that it copies take twice theirs


def lacking(choice: Previewing, ffn: FFN) -> str | None:
    """Why nothing here multiplies the image of a choice as codes, or None. ffn: gated, with plain weights."""
    image, kernels = choice.image, gather.missing(device_of(ffn)) is None
    dtypes, possible = {m.weight.dtype for m in served_inputs(ffn)}, False
    if isinstance(image, Copy):
        grouped = kernels or grouping(Rounding(image.bits, image.group), ffn.width) is not None
        possible = image.bits == 4 and grouped and dtypes <= DTYPES
    return None if possible else f"nothing here multiplies {image.title} of {' and '.join(map(str, dtypes))}"


@dataclass(frozen=True)
class CodedPreview(Preview):
    """The images of one layer as codes, of which nothing else is kept.

    Attributes:
        products: of gate and up, x -> [..., F].
    """

    products: tuple[Callable[[Tensor], Tensor], ...] = ()

    def seen(self, x: Tensor) -> list[Tensor]:
        return [multiply(x) for multiply in self.products]


_MADE: LastMade[CodedPreview] = LastMade()


@torch.no_grad()
def coded(image: Image, ffn: FFN) -> CodedPreview:
    """The image of a layer's gate and up as codes; the one last made is kept, since session after session asks for it.

    Its products differ from those with the image as a matrix (`previews`) by the rounding of 16-bit sums and scales.
    """
    matrices, kernels = served_inputs(ffn), gather.missing(device_of(ffn)) is None

    def make() -> CodedPreview:
        own = biases(ffn)
        made = [_coded(image, m, b, kernels) for m, b in zip(matrices, own, strict=True)]
        products, doubts = zip(*made, strict=True)
        return CodedPreview((), own, doubts, ffn.act, lift=ffn.lift, products=products)

    return _MADE.get(ffn.up, [m.weight for m in matrices], (image, kernels), make)


def _coded(image: Image, matrix: Served, bias: Tensor | None, kernels: bool) -> tuple[Any, Tensor]:
    """The product with an image of one matrix, and what the image leaves out of each row."""
    weight = matrix.weight
    assert isinstance(image, Copy)
    held = rounded(weight, Rounding(image.bits, image.group))
    multiply = functools.partial(_shown, CopyCodes.of(held).show, bias) if kernels else None
    return multiply or product(grouped(held), bias, weight.dtype), doubt(matrix, held.values.to(weight.dtype))


def _shown(multiply: Callable[[Tensor], Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    """The product of one token with an image: [..., D] -> [..., F]. multiply: [D] -> [F] fp32."""
    out = multiply(x.flatten())
    return (out if bias is None else out + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


class PreviewedRows(ChosenRows):
    """One FFN of which a token reads an image, and then the weights of the neurons alone that it takes by it.

    All neurons are kept; of down alone there is a copy, by neurons. Gate and up give the neurons taken, in the order of
    their rows, and no others; so h has these alone.
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
            (image.bits_of(m.stored, size, width) * size + m.bits * rows) / m.bits for m in served_inputs(self.ffn)
        )
        return gate, up, self.written

    @property
    def _all(self) -> bool:
        """Whether all rows of gate and up are multiplied, though few are of use."""
        return not self.kernels and self.taken > WHOLE * self.ffn.size

    def _choose(self, x: Tensor) -> Tensor:
        shown, expected = self.preview.look(*self.choice.parts_of(x, None))
        token = Token(shown, shown, shown, None, preview=shown, expected=expected)
        self._taken = best(self.choice.importance(token).flatten(), self.taken)
        return self._exactly(0, x)

    def _rest(self, x: Tensor) -> Tensor:
        return self._exactly(1, x)

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten())

    def _exactly(self, matrix: int, x: Tensor) -> Tensor:
        """[..., taken], the product with the rows taken. matrix: 0 for gate, 1 for up."""
        module = self._modules[matrix]
        weight, bias, flat, rows = module.weight, module.bias, x.reshape(1, -1), self._taken
        if self.kernels:
            out = gather.read_rows(weight, rows, flat[0])
            out = (out if bias is None else out + bias[rows].float()).to(x.dtype)
        elif self._all:
            out = linear(flat, weight, bias)[:, rows]
        else:
            parts = rows.split(max(1, PART_BYTES // (weight.shape[1] * weight.element_size())))
            out = torch.cat([
                linear(flat, weight.index_select(0, part), None if bias is None else bias[part]) for part in parts
            ], dim=-1)  # fmt: skip
        return out.view(*x.shape[:-1], -1)
