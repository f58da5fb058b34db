"""What h looks like through images of gate and up: the preview by which tokens choose their neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.quantised import bias_of
from dart_eval.pruning.calibration.made import LastMade
from dart_eval.pruning.choices.choices import Choice
from dart_eval.pruning.choices.images import Image
from dart_eval.pruning.masks.counts import Prices
from dart_eval.weights.rounding import Served, coded, served_inputs, served_output


@dataclass(frozen=True)
class Preview:
    """The images of one layer, by neuron.

    Attributes:
        weights: of gate and up, or of up alone, what gives [F, D] each. biases: of the same, [F] each or None.
        doubts: of the same, [F] fp32 each: the root mean square of what the image leaves out of a neuron's row.
        act: the activation.
        down: of down, what gives [D, F], where neurons write through an image; else None.
        columns: then [F] fp32, the squares of the norms of down's own columns.
        lift: what is done to up x before it is multiplied; None.
        rougher: the same, biases left out, with one bit fewer of each weight, where tokens read some columns so; None.
        order: [D], the columns in the order in which they lie, where that is not their own; None.
    """

    weights: tuple[Callable[[], Tensor], ...]
    biases: tuple[Tensor | None, ...]
    doubts: tuple[Tensor, ...]
    act: Callable[[Tensor], Tensor]
    down: Callable[[], Tensor] | None = None
    columns: Tensor | None = None
    lift: Callable[[Tensor], Tensor] | None = None
    rougher: Preview | None = None
    order: Tensor | None = None

    def look(self, x: Tensor, rough: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h as the images have it, and how much of it is to be expected.

        An image leaves something out of every row. Where x does not prefer it, a product with x is off by
        ||x|| * doubt, up or down; the expected square of h takes both in.

        Args:
            x: [..., D]. rough: [..., D], another part of x, which is multiplied with the rougher images; None: none.

        Returns:
            [..., F] h by the images, and [..., F] fp32 the expected square of h.
        """
        seen, off = self._both(x, rough)
        first = seen[0].float()
        expected = (self.act(first + off[0]).square() + self.act(first - off[0]).square()) / 2
        if len(seen) == 1:
            return self.act(seen[0]), expected
        up = seen[1] if self.lift is None else self.lift(seen[1])
        return self.act(seen[0]) * up, expected * (up.float().square() + off[1].square())

    def _both(self, x: Tensor, rough: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """What the images make of both parts of x together, and how far that may be off. Arguments as of `look`."""
        seen, off = self._seen(x)
        if rough is not None and self.rougher is not None:
            more, beside = self.rougher._seen(rough)
            seen = [a + b for a, b in zip(seen, more, strict=True)]
            off = [torch.hypot(a, b) for a, b in zip(off, beside, strict=True)]
        return seen, off

    def _seen(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the images make of x: [..., F] for each, and fp32 how far that may be off. x: [..., D]."""
        size = x.float().norm(dim=-1, keepdim=True)
        return self.seen(x), [size * doubt for doubt in self.doubts]

    def seen(self, x: Tensor) -> list[Tensor]:
        """What the images make of x: [..., F] for each. x: [..., D]."""
        return [nn.functional.linear(x, w(), b) for w, b in zip(self.weights, self.biases, strict=True)]

    def write(self, h: Tensor) -> Tensor:
        """[..., F] -> [..., D], what h adds through the image of down."""
        assert self.down is not None
        return nn.functional.linear(h, self.down())


def prices(choice: Choice, ffns: Sequence[FFN], everything: bool, unit: float) -> list[Prices]:
    """Per layer, what is read of a neuron.

    Args:
        everything: all neurons are in the mask; then what is read across down is in `whole`.
        unit: bits of a weight, on average, of a model whose sparsity is 0.
    """
    return [_prices(choice, ffn, everything, unit) for ffn in ffns]


def mean_prices(each: Sequence[Prices], ffns: Sequence[FFN]) -> Prices:
    """The mean over the neurons of all layers."""
    weights = sum(f.size * f.width for f in ffns)
    parts = [f.size * f.width / weights for f in ffns]
    fields = zip(*(dataclasses.astuple(prices) for prices in each), strict=True)
    return Prices(*(sum(p * x for p, x in zip(parts, values, strict=True)) for values in fields))


def _prices(choice: Choice, ffn: FFN, everything: bool, unit: float) -> Prices:
    """See `prices`."""
    image, columns = choice.image, choice.columns(ffn.width)
    assert image is not None
    whole = taken = 0.0
    for matrix in served_inputs(ffn):
        bits, (rows, width) = matrix.stored, matrix.weight.shape
        whole += image.read(bits, rows, width, columns) + choice.doubt_bits(ffn.width)
        taken += image.rest(bits, rows, width, columns)
    down = served_output(ffn)
    rows, width = down.weight.shape
    across = image.across(down.stored, rows, width, choice.grades) / unit
    whole = (whole + choice.norm_bits(ffn.width)) / unit + across * everything
    coarse = image.coarse(down.stored, rows, width) / unit
    return Prices(whole, taken / unit, down.stored.code / unit, coarse, across * (not everything))


def stored(choice: Choice, ffns: Sequence[FFN]) -> int:
    """Bytes that images, doubts and norms take beside the model."""
    image = choice.image
    if image is None:
        return 0
    inputs = [(f, m) for f in ffns for m in served_inputs(f)]
    bits = sum(m.weight.numel() * choice.doubt_bits(f.width) for f, m in inputs)
    bits += sum(f.pool * f.width * choice.norm_bits(f.width) for f in ffns)
    if image.stored:
        matrices = [m for _, m in inputs] + ([served_output(f) for f in ffns] if choice.grades else [])
        bits += sum(m.weight.numel() * image.bits_of(m.stored, *m.weight.shape) for m in matrices)
    return round(bits / 8)


_MADE: LastMade[Preview] = LastMade()
_ROUGHER: LastMade[Preview] = LastMade()


@torch.no_grad()
def previews(choice: Choice, ffns: Sequence[FFN], orders: Sequence[Tensor | None]) -> list[Preview] | None:
    """The images of every layer; those last made of a model are kept, since cell after cell asks for the same.

    Args:
        orders: of the columns of each layer, see `Preview`.

    Returns:
        None where the weights have shapes alone.
    """
    if ffns[0].output_weight().is_meta:
        return None
    return [_preview(choice, ffn, order) for ffn, order in zip(ffns, orders, strict=True)]


def _preview(choice: Choice, ffn: FFN, order: Tensor | None) -> Preview:
    image = choice.image
    assert image is not None
    found = _images(image, ffn, choice.grades)
    if choice.fewer:
        rougher = _images(image, ffn, False, choice.fewer)
        found = dataclasses.replace(found, rougher=dataclasses.replace(rougher, biases=(None,) * len(found.biases)))
    return found if order is None else dataclasses.replace(found, order=order)


def _images(image: Image, ffn: FFN, down: bool, fewer: int = 0) -> Preview:
    """The images of gate and up, and perhaps of down. fewer: bits of each weight that they lack."""
    matrices = [*served_inputs(ffn), *([served_output(ffn)] if down else [])]
    inputs = ffn.matrices - 1

    def make() -> Preview:
        seen = [image.decoded(m, fewer) for m in matrices]
        doubts = [doubt(m, v()) for m, v in zip(matrices[:inputs], seen, strict=False)]
        if ffn.routed:
            from dart_eval.pruning.experts.expert_previews import of_experts  # which takes what stands here

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
