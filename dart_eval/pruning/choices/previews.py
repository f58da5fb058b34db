"""What h looks like through images of gate and up: the preview by which tokens choose their neurons."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.made import LastMade
from dart_eval.pruning.choices.choice import AnyChoice, ChoiceLayer, Token, of_rows
from dart_eval.pruning.choices.images import Image
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.experts.expert_previews import of_experts
from dart_eval.weights.rounding import Served, coded, served_inputs, served_output


class PreviewLayer(ChoiceLayer):
    """A choice by a preview, at work on one FFN. The preview is made when a token first looks.

    Args:
        image: what a preview reads of gate and up. order: [D], the columns as they lie, see `Preview`; None.
        fewer: bits that a second, rougher image lacks; 0: there is none.
    """

    def __init__(self, choice: AnyChoice, ffn: FFN, image: Image, order: Tensor | None, fewer: int = 0) -> None:
        super().__init__(choice, ffn)
        self.image, self.order, self.fewer = image, order, fewer
        self._extra: Tensor | None = None  # what neurons write through an image for the tokens that chose last

    @functools.cached_property
    def preview(self) -> Preview:
        """The images of the layer; those last made are kept, since cell after cell asks for the same."""
        found = _images(self.image, self.ffn, self.choice.adds)
        if self.fewer:
            rougher = _images(self.image, self.ffn, False, self.fewer)
            rougher = dataclasses.replace(rougher, biases=(None,) * len(found.biases))
            found = dataclasses.replace(found, rougher=rougher)
        return found if self.order is None else dataclasses.replace(found, order=self.order)

    def look(self, token: Token) -> Token:
        assert token.x is not None
        seen = self.preview.look(*self.choice.parts_of(token.x, self.order))
        token.preview, token.expected = (of_rows(part, token.rows) for part in seen)
        if (columns := self.preview.columns) is not None:
            token.columns = self.ffn.of_token(of_rows(columns, token.rows)[None], len(token.x))
        return super().look(token)

    def choose(self, token: Token) -> Tensor:
        kept = super().choose(token)
        if self.choice.adds:
            assert token.preview is not None
            rough = self.choice.roughly(token, kept)
            self._extra = self.preview.write(token.preview * rough.view(torch.uint8))
        return kept

    def extra(self) -> Tensor | None:
        found, self._extra = self._extra, None
        return found


_MADE: LastMade[Preview] = LastMade()
_ROUGHER: LastMade[Preview] = LastMade()


@torch.no_grad()
def _images(image: Image, ffn: FFN, down: bool, fewer: int = 0) -> Preview:
    """The images of gate and up, and perhaps of down. fewer: bits of each weight that they lack."""
    matrices = [*served_inputs(ffn), *([served_output(ffn)] if down else [])]
    inputs = ffn.matrices - 1

    def make() -> Preview:
        seen = [image.decoded(m, fewer) for m in matrices]
        doubts = [doubt(m, v()) for m, v in zip(matrices[:inputs], seen, strict=False)]
        if ffn.routed:
            last = (seen[inputs], matrices[inputs].values) if down else (None, None)
            return of_experts(ffn.routed, seen[:inputs], doubts, *last)
        written, columns = (seen[inputs], squares(matrices[inputs])) if down else (None, None)
        return Preview(tuple(seen[:inputs]), biases(ffn), tuple(doubts), ffn.act, written, columns, ffn.lift)

    own = [m.weight for m in matrices] if ffn.routed is None else [*ffn.routed.experts.parameters()]
    of = image, fewer, *(m.stored for m in matrices), *(coded(m) for m in ffn.projections)
    return (_ROUGHER if fewer else _MADE).get(ffn.up, own, of, make)


def doubt(matrix: Served, seen: Tensor) -> Tensor:
    """[F] fp32 (kept as fp16): the root mean square of what an image leaves out of each row."""
    left_out = matrix.values - seen.float()
    return left_out.square().mean(1).sqrt().half().float()


def squares(down: Served) -> Tensor:
    """[F] fp32: the square of the norm (kept as fp16) of each column of down."""
    return down.values.norm(dim=0).half().float().square()


def biases(ffn: FFN) -> tuple[Tensor | None, ...]:
    """Of gate and up, or of up alone: [F] each, or None."""
    found = [bias_of(m) for m in (ffn.gate, ffn.up) if m is not None]
    return tuple(found if not ffn.fused else [None, None] if found[0] is None else found[0].chunk(2))
