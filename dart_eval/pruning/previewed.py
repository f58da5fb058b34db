"""A token's choice by a preview, so that it saves time: the image is multiplied as codes, chosen rows alone are read.

For one token of one sequence, and without a mask: the image of gate and up says what h^2 is to be expected of every
neuron, as under `masked` execution; the rows of gate and up of the largest are read exactly; those with the largest |h|
are summed from down's rows. On a CPU the image is a copy of 4 bits, multiplied by torch's packed product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dart_eval.bits import OWN_BITS, Rounding
from dart_eval.ffn import FFN
from dart_eval.pruning import gather
from dart_eval.pruning.parts.choices import Choice, Token
from dart_eval.pruning.parts.images import Copy, Image
from dart_eval.pruning.previews import Preview, biases, doubt
from dart_eval.pruning.products import grouped, grouping, product
from dart_eval.pruning.slices import Down, GatheredFFN, best
from dart_eval.rounding import Served, rounded, served_inputs

DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # of x, in torch's packed products
PART_BYTES = 1 << 19  # of rows that a CPU copies side by side before it multiplies them: so many stay in its cache
WHOLE = 0.45  # of the rows: from here on a CPU multiplies all in less time, since rows that it copies take twice theirs


def lacking(image: Image, ffn: FFN) -> str | None:
    """Why no product with the codes of an image is here, or None. ffn: gated, with plain weights."""
    if not isinstance(image, Copy) or grouping(Rounding(image.bits, image.group), ffn.width) is None:
        return f"no product here takes {image.title}"
    dtypes = {m.weight.dtype for m in served_inputs(ffn)}
    return None if dtypes <= DTYPES else f"no product with {image.title} is of {', '.join(map(str, dtypes))}"


@dataclass(frozen=True)
class CodedPreview(Preview):
    """The images of one layer as codes, of which nothing else is kept.

    Attributes:
        products: of gate and up, x -> [..., F].
    """

    products: tuple[Callable[[Tensor], Tensor], ...] = ()

    def seen(self, x: Tensor) -> list[Tensor]:
        return [multiply(x) for multiply in self.products]


_MADE: weakref.WeakKeyDictionary[nn.Module, tuple[object, CodedPreview]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def coded(image: Image, ffn: FFN) -> CodedPreview:
    """The image of a layer's gate and up as codes; the one last made is kept, since session after session asks for it.

    Its products differ from those with the image as a matrix (`previews`) by the rounding of 16-bit sums and scales.
    """
    matrices = served_inputs(ffn)
    key = (image, *((m.weight.data_ptr(), m.weight._version, str(m.weight.dtype)) for m in matrices))
    known = _MADE.get(ffn.up)
    if known is None or known[0] != key:
        own = biases(ffn)
        made = [_coded(image, m, b) for m, b in zip(matrices, own, strict=True)]
        products, doubts = zip(*made, strict=True)
        _MADE[ffn.up] = known = key, CodedPreview((), own, doubts, ffn.act, products=products)
    return known[1]


def _coded(image: Image, matrix: Served, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The product with an image of one matrix, and what the image leaves out of each row."""
    assert isinstance(image, Copy)
    weight = matrix.weight
    held = rounded(weight, Rounding(image.bits, image.group))
    return product(grouped(held), bias, weight.dtype), doubt(matrix, held.values.to(weight.dtype))


class PreviewedFFN(GatheredFFN):
    """One FFN of which a token reads an image, and then the weights of the neurons alone that it takes by it.

    While narrow, gate and up give the neurons taken, in the order of their rows, and no others; so h has these alone.
    """

    def __init__(self, ffn: FFN, down: Down, choice: Choice) -> None:
        super().__init__(ffn, down)
        assert choice.image is not None
        self.choice, self.image = choice, choice.image
        self.preview = coded(choice.image, ffn)
        self._chosen = False  # the token under way has chosen

    @property
    def read(self) -> tuple[float, float, float]:
        shown = self.image.bits_of(OWN_BITS, self.ffn.size, self.ffn.width) / OWN_BITS * self.ffn.size
        rows = self.ffn.size if self._all else self.taken
        return shown + rows, shown + rows, self.written

    @property
    def _all(self) -> bool:
        """Whether all rows of gate and up are multiplied, though few are of use."""
        return not self.kernels and self.taken > WHOLE * self.ffn.size

    def _gate(self, x: Tensor) -> Tensor:
        shown, expected = self.preview.look(x, self.choice.thin)
        token = Token(shown, shown, shown, None, preview=shown, expected=expected)
        self._taken = best(self.choice.importance(token).flatten(), self.taken)
        self._chosen = True
        return self._exactly(self.ffn.gate, x)

    def _up(self, x: Tensor) -> Tensor:
        assert self._chosen, "up ran before gate"
        self._chosen = False
        return self._exactly(self.ffn.up, x)

    def _down(self, h: Tensor) -> Tensor:
        return self._write(h, h.flatten())

    def _exactly(self, module: Any, x: Tensor) -> Tensor:
        """[..., taken], the product with the rows taken."""
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
