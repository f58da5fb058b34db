"""What h looks like through images of gate and up: the preview by which tokens choose their neurons."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dart_eval.allocation import Prices
from dart_eval.ffn import FFN
from dart_eval.machine import release
from dart_eval.pruning.parts.choices import Choice
from dart_eval.pruning.parts.images import Image, columns
from dart_eval.pruning.planes import truncated
from dart_eval.pruning.top import top_k_mask
from dart_eval.quantised import bias_of
from dart_eval.rounding import Served, coded, parameter_of, served_bits, served_inputs, served_output


@dataclass(frozen=True)
class Preview:
    """The images of one layer, by neuron.

    Attributes:
        weights: of gate and up, or of up alone, [F, D] each. biases: of the same, [F] each or None.
        doubts: of the same, [F] fp32 each: the root mean square of what the image leaves out of a neuron's row.
        act: the activation.
        down: of down, [D, F], where neurons write through an image; else None.
        columns: then [F] fp32, the squares of the norms of down's own columns.
        lift: what is done to up x before it is multiplied; None.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    doubts: tuple[Tensor, ...]
    act: Callable[[Tensor], Tensor]
    down: Tensor | None = None
    columns: Tensor | None = None
    lift: Callable[[Tensor], Tensor] | None = None

    def look(self, x: Tensor, thin: float = 1.0) -> tuple[Tensor, Tensor]:
        """h as the images have it, and how much of it is to be expected.

        An image leaves something out of every row. Where x does not prefer it, a product with x is off by
        ||x|| * doubt, up or down; the expected square of h takes both in.

        Args:
            x: [..., D]. thin: share of its entries, the largest, that the images are multiplied with.

        Returns:
            [..., F] h by the images, and [..., F] fp32 the expected square of h.
        """
        x = thinned(x, thin)
        seen = self.seen(x)
        size = x.float().norm(dim=-1, keepdim=True)
        off = [size * doubt for doubt in self.doubts]
        first = seen[0].float()
        expected = (self.act(first + off[0]).square() + self.act(first - off[0]).square()) / 2
        if len(seen) == 1:
            return self.act(seen[0]), expected
        up = seen[1] if self.lift is None else self.lift(seen[1])
        return self.act(seen[0]) * up, expected * (up.float().square() + off[1].square())

    def seen(self, x: Tensor) -> list[Tensor]:
        """What the images make of x: [..., F] for each. x: [..., D]."""
        return [nn.functional.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def write(self, h: Tensor) -> Tensor:
        """[..., F] -> [..., D], what h adds through the image of down."""
        assert self.down is not None
        return nn.functional.linear(h, self.down)


def thinned(x: Tensor, thin: float) -> Tensor:
    """x with that share of its entries alone, the largest."""
    return x if thin == 1 else x * top_k_mask(x.abs(), torch.full(x.shape[:-1], columns(x.shape[-1], thin)))


def prices(choice: Choice, precision: int, ffns: Sequence[FFN], everything: bool) -> list[Prices]:
    """Per layer, what is read of a neuron.

    Args:
        precision: bits of a weight that are read at most; 0: all.
        everything: all neurons are in the mask; then what is read across down is in `whole`.
    """
    mean = served_bits(ffns)
    return [_prices(choice, precision, ffn, everything, mean) for ffn in ffns]


def mean_prices(each: Sequence[Prices], ffns: Sequence[FFN]) -> Prices:
    """The mean over the neurons of all layers."""
    weights = sum(f.size * f.width for f in ffns)
    parts = [f.size * f.width / weights for f in ffns]
    fields = zip(*(dataclasses.astuple(prices) for prices in each), strict=True)
    return Prices(*(sum(p * x for p, x in zip(parts, values, strict=True)) for values in fields))


def _prices(choice: Choice, precision: int, ffn: FFN, everything: bool, mean: float) -> Prices:
    """See `prices`. mean: bits of a weight, of which a row of a mean matrix is made."""
    image, thin = choice.image, choice.thin
    assert image is not None
    whole = taken = 0.0
    for matrix in served_inputs(ffn):
        bits, (rows, width) = matrix.stored, matrix.weight.shape
        whole += image.read(bits, rows, width, thin) + choice.doubt_bits(ffn.width)
        taken += image.left(matrix, precision) + image.unseen(bits, rows, width, thin)
    down = served_output(ffn)
    rows, width = down.weight.shape
    across = image.across(down.stored, rows, width, choice.grades) / mean
    whole = (whole + choice.norm_bits(ffn.width)) / mean + across * everything
    written, coarse = image.column(down, precision), image.coarse(down.stored, rows, width)
    return Prices(whole, taken / mean, written / mean, coarse / mean, across * (not everything))


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


T = TypeVar("T")


class LastMade(Generic[T]):
    """What was last made of each module's weights: cell after cell and session after session asks for the same."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[object, T]] = weakref.WeakKeyDictionary()

    def get(self, module: nn.Module, weights: Sequence[Tensor], how: object, make: Callable[[], T]) -> T:
        """What is known of a module, made anew where the weights, what is in them or `how` are others."""
        key = how, *((w.data_ptr(), w._version, str(w.dtype)) for w in weights)
        known = self._known.get(module)
        if known is None or known[0] != key:
            self._known[module] = known = key, make()
            release()
        return known[1]


_MADE: LastMade[Preview] = LastMade()


@torch.no_grad()
def previews(image: Image, ffns: Sequence[FFN], down: bool) -> list[Preview] | None:
    """The images of every layer; those last made of a model are kept, since cell after cell asks for the same.

    Args:
        down: also of down.

    Returns:
        None where the weights have shapes alone.
    """
    return None if _shapes_alone(ffns) else [_preview(image, ffn, down) for ffn in ffns]


def _shapes_alone(ffns: Sequence[FFN]) -> bool:
    return ffns[0].output_weight().is_meta


def _preview(image: Image, ffn: FFN, down: bool) -> Preview:
    matrices = [*served_inputs(ffn), *([served_output(ffn)] if down else [])]
    inputs = ffn.matrices - 1

    def make() -> Preview:
        values = [_values(image, m) for m in matrices]
        doubts = [doubt(m, v) for m, v in zip(matrices[:inputs], values, strict=False)]
        if ffn.routed:
            from dart_eval.pruning.expert_previews import of_experts  # which takes what stands here

            last = (values[inputs], matrices[inputs].weight) if down else (None, None)
            return of_experts(ffn.routed, values[:inputs], doubts, *last)
        written, columns = (values[inputs], squares(matrices[inputs])) if down else (None, None)
        return Preview(tuple(values[:inputs]), biases(ffn), tuple(doubts), ffn.act, written, columns, ffn.lift)

    own = [m.weight for m in matrices] if ffn.routed is None else [*ffn.routed.experts.parameters()]
    return _MADE.get(ffn.up, own, (image, *(m.stored for m in matrices)), make)


def doubt(matrix: Served, seen: Tensor) -> Tensor:
    """[F] fp32 (kept as fp16): the root mean square of what an image leaves out of each row."""
    left_out = matrix.weight.float() - seen.float()
    return left_out.square().mean(1).sqrt().half().float()


def squares(down: Served) -> Tensor:
    """[F] fp32: the square of the norm (kept as fp16) of each column of down."""
    return down.weight.float().norm(dim=0).half().float().square()


def _values(image: Image, matrix: Served) -> Tensor:
    return image.values(matrix).to(matrix.weight.dtype)


def biases(ffn: FFN) -> tuple[Tensor | None, ...]:
    """Of gate and up, or of up alone: [F] each, or None."""
    found = [bias_of(m) for m in (ffn.gate, ffn.up) if m is not None]
    return tuple(found if not ffn.fused else [None, None] if found[0] is None else found[0].chunk(2))


class Fine:
    """FFN weights of which decoding forwards read the first bits alone; prompts have all of them.

    Attributes:
        held: the projections' parameters, each with its own weights and those that have lost their last bits.
    """

    def __init__(self, held: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
        self.held = held
        self.in_place = False

    @classmethod
    def of(cls, ffns: Sequence[FFN], mantissa: int | None) -> Fine | None:
        """Of these FFNs; None where all bits are read, as of all weights that are codes, or there are no weights.

        Args:
            mantissa: bits of it that are read; None: all.
        """
        if mantissa is None or _shapes_alone(ffns):
            return None
        modules: list[Any] = [m for f in ffns for m in f.projections if coded(m) is None]
        if not modules:
            return None
        return cls([(parameter_of(m), parameter_of(m).data, _fine(m, mantissa)) for m in modules])

    def begin(self) -> None:
        """Decoding forwards from here on."""
        self.in_place = True
        for parameter, _, fine in self.held:
            parameter.data = fine

    def end(self) -> None:
        """The weights are whole again, to the bit."""
        for parameter, own, _ in self.held:
            parameter.data = own
        self.in_place = False


_FINE: LastMade[Tensor] = LastMade()


def _fine(module: Any, mantissa: int) -> Tensor:
    """The weight of a projection without its last bits; the one last made is kept."""
    weight = parameter_of(module)
    return _FINE.get(module, [weight], mantissa, lambda: truncated(weight.data, mantissa))
