"""Choices by a preview at work: images of gate and up, by which tokens choose their neurons."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.pruning.choices.choice import AnyChoice, ChoiceLayer, Token, of_rows
from dart_eval.pruning.choices.images import Image
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.experts.expert_previews import of_experts
from dart_eval.weights.rounding import Served, coded, served_inputs, served_output


class PreviewLayer(ChoiceLayer):
    """A choice by a preview, at work on one FFN. The preview is made when a token first looks.

    Args:
        image: the image of gate and up.
        order: [D], the stored order of the columns, see `Serving.orders`; None: their own.
        fewer: bits that a second, rougher image lacks; 0: there is none.
    """

    def __init__(self, choice: AnyChoice, ffn: FFN, image: Image, order: Tensor | None, fewer: int = 0) -> None:
        super().__init__(choice, ffn)
        self.image, self.order, self.fewer = image, order, fewer
        self._extra: Tensor | None = None  # written through an image for the tokens that chose last

    @functools.cached_property
    def preview(self) -> Preview:
        """The images of the layer, cached for the next cell."""
        preview = images_of(self.image, self.ffn, self.choice.adds)
        if self.fewer:
            rougher = images_of(self.image, self.ffn, False, self.fewer)
            rougher = dataclasses.replace(rougher, biases=(None,) * len(preview.biases))
            preview = dataclasses.replace(preview, rougher=rougher)
        return preview

    def look(self, token: Token) -> Token:
        assert token.x is not None
        seen = self.preview.look(*self.choice.parts_of(token.x, self.order))
        token.preview, token.expected = (of_rows(part, token.rows) for part in seen)
        if (columns := self.preview.columns) is not None:
            token.columns = self.ffn.of_token(of_rows(columns, token.rows)[None], len(token.x))
        return super().look(token)

    def choose(self, token: Token) -> Tensor:
        chosen = super().choose(token)
        if self.choice.adds:
            assert token.preview is not None
            self.shown = self.choice.approximated(token, chosen)
            self._extra = self.preview.write(token.preview * self.shown.view(torch.uint8))
        return chosen

    def extra(self) -> Tensor | None:
        extra, self._extra = self._extra, None
        return extra


_CACHE: WeightCache[Preview] = WeightCache()
_ROUGHER: WeightCache[Preview] = WeightCache()


@torch.no_grad()
def images_of(image: Image, ffn: FFN, down: bool, fewer: int = 0) -> Preview:
    """Return the images of gate and up, and of `down` if asked. fewer: bits of each weight that they lack."""
    matrices = [*served_inputs(ffn), *([served_output(ffn)] if down else [])]
    inputs = ffn.matrices - 1

    def make() -> Preview:
        seen = [image.decoded(m, fewer) for m in matrices]
        row_errors = [row_error(m, v()) for m, v in zip(matrices[:inputs], seen, strict=False)]
        if ffn.routed:
            last = (seen[inputs], matrices[inputs].values) if down else (None, None)
            return of_experts(ffn.routed, seen[:inputs], row_errors, *last)
        written, columns = (seen[inputs], squares(matrices[inputs])) if down else (None, None)
        return Preview(tuple(seen[:inputs]), biases(ffn), tuple(row_errors), ffn.act, written, columns, ffn.lift)

    own = [m.weight for m in matrices] if ffn.routed is None else [*ffn.routed.experts.parameters()]
    of = image, fewer, *(m.stored for m in matrices), *(coded(m) for m in ffn.projections)
    return (_ROUGHER if fewer else _CACHE).get(ffn.up, own, of, make)


def row_error(matrix: Served, seen: Tensor) -> Tensor:
    """Return [F] fp32 (rounded to fp16) the root mean square error of an image's rows. seen: [F, D], the image."""
    return (matrix.values - seen.float()).square().mean(1).sqrt().half().float()


def squares(down: Served) -> Tensor:
    """Return [F] fp32 the squared norm (rounded to fp16) of each column of down."""
    return down.values.norm(dim=0).half().float().square()


def biases(ffn: FFN) -> tuple[Tensor | None, ...]:
    """Return the biases of gate and up, or of up alone: [F] each, or None."""
    own = [bias_of(m) for m in (ffn.gate, ffn.up) if m is not None]
    return tuple(own if not ffn.fused else [None, None] if own[0] is None else own[0].chunk(2))
