"""A token's choice by a preview, so that it saves time: the image is multiplied as codes, chosen rows alone are read.

For one token of one sequence, and without a mask: the image of gate and up says what h^2 is to be expected of every
neuron, as under `masked` execution; the rows of gate and up of the largest are read exactly; those with the largest |h|
are summed from down's rows. On a CPU the image is a copy of 4 bits, multiplied by torch's packed product; on a GPU it
is such a copy or the plane of bfloat16 weights (`image_kernels`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dart_eval.bits import OWN_BITS, Rounding
from dart_eval.ffn import FFN, device_of
from dart_eval.pruning import gather
from dart_eval.pruning.image_kernels import CODE_BITS, CopyCodes, PlaneCodes
from dart_eval.pruning.parts.choices import Choice, Token
from dart_eval.pruning.parts.images import Copy, Image, Plane
from dart_eval.pruning.previews import LastMade, Preview, biases, doubt
from dart_eval.pruning.products import grouped, grouping, product
from dart_eval.pruning.slices import Down, GatheredFFN, best
from dart_eval.rounding import Served, rounded, served_inputs

DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # of x, in torch's packed products
PART_BYTES = 1 << 19  # of rows that a CPU copies side by side before it multiplies them: so many stay in its cache
WHOLE = 0.45  # of the rows: from here on a CPU multiplies all in less time, since rows that it copies take twice theirs


def lacking(choice: Choice, ffn: FFN) -> str | None:
    """Why nothing here multiplies the image of a choice as codes, or None. ffn: gated, with plain weights."""
    image, kernels = choice.image, gather.missing(device_of(ffn)) is None
    assert image is not None
    served = served_inputs(ffn)
    dtypes = {m.weight.dtype for m in served}
    if isinstance(image, Copy):
        grouped = kernels or grouping(Rounding(image.bits, image.group), ffn.width) is not None
        possible = image.bits == 4 and grouped and dtypes <= DTYPES
    else:
        own = all(m.packed is None for m in served) and dtypes == {torch.bfloat16}
        possible = (
            isinstance(image, Plane) and kernels and own and not choice.precision and image.top(OWN_BITS) > CODE_BITS
        )
    return None if possible else f"nothing here multiplies {image.title} of {' and '.join(map(str, dtypes))}"


@dataclass(frozen=True)
class CodedPreview(Preview):
    """The images of one layer as codes, of which nothing else is kept.

    Attributes:
        products: of gate and up, x -> [..., F].
        readers: of the same, (rows, x [D]) -> [rows] fp32, where exact rows are read beside the image.
    """

    products: tuple[Callable[[Tensor], Tensor], ...] = ()
    readers: tuple[Callable[[Tensor, Tensor], Tensor] | None, ...] = ()

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
        products, readers, doubts = zip(*made, strict=True)
        return CodedPreview((), own, doubts, ffn.act, lift=ffn.lift, products=products, readers=readers)

    return _MADE.get(ffn.up, [m.weight for m in matrices], (image, kernels), make)


def _coded(image: Image, matrix: Served, bias: Tensor | None, kernels: bool) -> tuple[Any, Any, Tensor]:
    """The product with an image of one matrix, what reads its exact rows, and what the image leaves out of each row."""
    weight = matrix.weight
    if isinstance(image, Plane):
        planes = PlaneCodes(weight, image.top(OWN_BITS) - 1 - CODE_BITS)
        values = image.values(matrix)
        return functools.partial(_shown, planes.show, bias), planes.read, doubt(matrix, values.to(weight.dtype))
    assert isinstance(image, Copy)
    held = rounded(weight, Rounding(image.bits, image.group))
    multiply = functools.partial(_shown, CopyCodes.of(held).show, bias) if kernels else None
    return multiply or product(grouped(held), bias, weight.dtype), None, doubt(matrix, held.values.to(weight.dtype))


def _shown(multiply: Callable[[Tensor], Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    """The product of one token with an image: [..., D] -> [..., F]. multiply: [D] -> [F] fp32."""
    out = multiply(x.flatten())
    return (out if bias is None else out + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


class PreviewedFFN(GatheredFFN):
    """One FFN of which a token reads an image, and then the weights of the neurons alone that it takes by it.

    While narrow, gate and up give the neurons taken, in the order of their rows, and no others; so h has these alone.
    """

    def __init__(self, ffn: FFN, down: Down, choice: Choice) -> None:
        super().__init__(ffn, down)
        assert choice.image is not None
        self.choice, self.image = choice, choice.image
        self.preview = coded(choice.image, ffn)

    @property
    def read(self) -> tuple[float, float, float]:
        size, width, image, rows = self.ffn.size, self.ffn.width, self.image, self.ffn.size if self._all else self.taken
        gate, up = (
            (image.bits_of(m.stored, size, width) * size + image.left(m) * rows) / m.bits
            for m in served_inputs(self.ffn)
        )
        return gate, up, self.written

    @property
    def _all(self) -> bool:
        """Whether all rows of gate and up are multiplied, though few are of use."""
        return not self.kernels and self.taken > WHOLE * self.ffn.size

    def _choose(self, x: Tensor) -> Tensor:
        shown, expected = self.preview.look(x, self.choice.thin)
        token = Token(shown, shown, shown, None, preview=shown, expected=expected)
        self._taken = best(self.choice.importance(token).flatten(), self.taken)
        return self._exactly(0, x)

    def _rest(self, x: Tensor) -> Tensor:
        return self._exactly(1, x)

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten())

    def _exactly(self, matrix: int, x: Tensor) -> Tensor:
        """[..., taken], the product with the rows taken. matrix: 0 for gate, 1 for up."""
        module, reader = self._modules[matrix], self.preview.readers[matrix]
        weight, bias, flat, rows = module.weight, module.bias, x.reshape(1, -1), self._taken
        if self.kernels:
            out = gather.read_rows(weight, rows, flat[0]) if reader is None else reader(rows, flat[0])
            out = (out if bias is None else out + bias[rows].float()).to(x.dtype)
        elif self._all:
            out = linear(flat, weight, bias)[:, rows]
        else:
            parts = rows.split(max(1, PART_BYTES // (weight.shape[1] * weight.element_size())))
            out = torch.cat([
                linear(flat, weight.index_select(0, part), None if bias is None else bias[part]) for part in parts
            ], dim=-1)  # fmt: skip
        return out.view(*x.shape[:-1], -1)
