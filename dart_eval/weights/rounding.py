"""FFN weights rounded to few bits: a control that every pruner must beat, and weights that a pruner can run on.

A group of weights in a row shares a scale: w is about scale * code, with an integer code of `bits` bits. The model
keeps its dtype and holds the rounded values, so that every execution runs on them. Reads are those of a low-bit kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import ExpertProjection
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import find_ffns, refuse_second
from dart_eval.layers.projection import plain_matrix
from dart_eval.layers.quantised import RECORDS, Record
from dart_eval.util.bits import MATRICES, OWN_BITS, Rounding, Stored, parse
from dart_eval.util.errors import UserError
from dart_eval.weights import k_quants
from dart_eval.weights.calibrated import calibrated, laid_out
from dart_eval.weights.codes import Packed

if TYPE_CHECKING:
    from dart_eval.pruning.calibration import Calibration

# Scales that are tried, as factors on the one that just reaches a group's largest weight.
FACTORS = (1.14, 1.07, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54)
CHUNK = 1 << 22  # weights that are rounded at a time


@torch.no_grad()
def rounded(weight: Tensor, rounding: Rounding, squares: Tensor | None = None) -> Packed:
    """Round a matrix [out, in] so that the squared error of each group is small.

    The group's largest weight sets the first scale, with the sign that gives it the code -2^(bits - 1), which has no
    positive counterpart. `FACTORS` times that scale are tried, each fitted to its codes by least squares, and the best
    is taken. The mean squares [in] of inputs on a text give the importance weights of a K-quant.
    """
    if weight.is_meta:  # a shape alone
        shared = len(weight), -(-weight.shape[1] // (rounding.group or weight.shape[1]))
        offset = weight.new_empty(shared, dtype=torch.float32) if rounding.k and rounding.bits > 3 else None
        return Packed(weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(shared), rounding, offset)
    width = weight.shape[1]
    group, parts = min(rounding.group, width) or width, []
    for rows in weight.split(max(1, CHUNK // width)):
        wide = [rows.float()] if squares is None else [rows.float(), k_quants.importance_of(rows.float(), squares)]
        groups = (nn.functional.pad(values, (0, -width % group)).view(len(rows), -1, group) for values in wide)
        code, *of_groups = _group_codes(rounding, *groups)
        parts.append([code.flatten(1)[:, :width].to(torch.int8), *(part.squeeze(-1) for part in of_groups)])
    codes, scales, *offsets = (torch.cat(part) for part in zip(*parts, strict=True))
    return Packed(codes, scales, rounding, *offsets)


def _group_codes(rounding: Rounding, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return codes [R, G, group], scales [R, G, 1], and the value of code 0 [R, G, 1] unless it is 0. groups: fp32."""
    bits = rounding.bits
    if rounding.k and bits > 3:
        return k_quants.with_minima(groups, bits, importance)
    scale = _best_scale(groups, bits, importance)
    scale = k_quants.multiples(scale, bits, k_quants.MOST_SIGNED) if rounding.k else scale.half()
    return _codes(groups, scale.float(), bits), scale


def _codes(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return codes [..., group], fp32 whole numbers. scale: [..., 1], 0 if all weights are 0."""
    half = 2 ** (bits - 1)
    return (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-half, half - 1)


def _best_scale(groups: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Return [..., 1] fp32, the scale of each group. groups, importance: [..., group] fp32."""
    weighed = 1.0 if importance is None else importance
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    first = -largest / 2 ** (bits - 1)
    best, least = first, torch.full_like(first, torch.inf)
    for factor in FACTORS:
        code = _codes(groups, first * factor, bits)
        square = (code.square() * weighed).sum(-1, keepdim=True)
        product = (groups * code * weighed).sum(-1, keepdim=True)
        scale = product / torch.where(square == 0, 1.0, square)
        error = -product * scale  # squared error, up to a constant
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def stored_of(linear: nn.Module) -> Stored:
    """Return the bits of a projection's weight as served now: of its code, and of scales."""
    record = RECORDS.get(linear)
    return Stored.of(OWN_BITS) if record is None else record.bits


def stored_inputs(ffn: FFN) -> list[Stored]:
    """Return the bits of a served weight of each matrix that makes h."""
    return [stored_of(m) for m in (ffn.gate, ffn.up) if m is not None for _ in range(2 if ffn.fused else 1)]


def about(ffns: Sequence[FFN]) -> bool:
    """Whether reads are about right alone, as some bits are those of a checkpoint's configuration."""
    return any(stored_of(m).about for f in ffns for m in f.projections)


def matrices(ffn: FFN) -> Iterator[tuple[str, nn.Module]]:
    """Yield the projections of an FFN, each after its name in a mix (`bits.MATRICES`); a fused one is called up."""
    return ((name, module) for name in MATRICES if (module := getattr(ffn, name)) is not None)


def served_bits(ffns: Sequence[FFN], rounding: Rounding | None = None) -> float:
    """Return the mean bits of an FFN weight over all layers, scales included: as served now, or under a rounding."""
    bits = weights = 0.0
    for ffn in ffns:
        for name, module in matrices(ffn):
            size = (2 if ffn.fused and module is ffn.up else 1) * ffn.size * ffn.width
            stored = stored_of(module) if rounding is None else rounding.of(name).stored(plain_matrix(module).shape[1])
            bits += stored.total * size
            weights += size
    return bits / weights


def served_share(ffns: Sequence[FFN]) -> float:
    """Return the FFN weight bytes as served now / those in the model's own dtype."""
    return served_bits(ffns) / OWN_BITS


def served_share_of_inputs(ffns: Sequence[FFN]) -> float:
    """Return the same share for the matrices that make h."""
    weights = sum(f.size * f.width for f in ffns)
    return sum(bits_per_row(f)[0] * f.size * f.width for f in ffns) / weights / OWN_BITS


def bits_per_row(ffn: FFN) -> tuple[float, float, float]:
    """Return the bits per weight: of a row of gate or up (their mean), of a column of down, and of down's scales.

    A scale of down spans weights of several neurons, so every token reads all of them.
    """
    inputs, down = stored_inputs(ffn), stored_of(ffn.down)
    return sum(bits.total for bits in inputs) / len(inputs), down.total, down.scale


def refuse_fixed(ffns: Sequence[FFN], rounding: Rounding) -> None:
    """Refuse FFN weights that cannot be rounded.

    Raises:
        UserError: they are quantised already, have no parameter of their own, or not what the rounding needs.
    """
    parts, one = dict(rounding.parts), any(f.fused for f in ffns)
    for wrong, reason in (
        (rounding.by and any(f.routed or f.runs > 1 for f in ffns), "takes no experts, and no layers that run twice"),
        ("gate" in parts and not all(f.gated for f in ffns), "names gate, and there is none"),
        (one and parts.get("gate") != parts.get("up"), "parts gate and up, which are one matrix"),
    ):
        if wrong:
            raise UserError(f"{rounding.text} {reason}", "use a format without calibration, such as q4_k")
    try:
        for module in (m for f in ffns for m in f.projections):
            parameter_of(module)
    except UserError as error:
        raise UserError(error.problem, "leave --ffn-bits out, or load the model unquantised") from None


class Rounded:
    """The FFN weights of a model, original and rounded; one of the two is in place.

    Args:
        model: with plain weights.
        rounding: of the weights, applied once.
        text: what a calibrated rounding looks at; None: others only.

    Raises:
        UserError: the weights are quantised already, or the rounding needs what there is not.
    """

    def __init__(self, model: nn.Module, rounding: Rounding, text: Calibration | None = None) -> None:
        ffns = find_ffns(model)
        refuse_fixed(ffns, rounding)
        places = [(module, parameter_of(module), rounding.of(name)) for f in ffns for name, module in matrices(f)]
        packed: Iterable[Packed] = (rounded(plain_matrix(module), own) for module, _, own in places)
        if rounding.by:
            packed = calibrated(model, places, rounding.text, text, rounded)
        self._parts: list[tuple[nn.Module, nn.Parameter, Tensor, Record]] = []  # with rounded values
        for (module, parameter, own), codes in zip(places, packed, strict=True):
            values = laid_out(module, codes.decoded(parameter.dtype))
            self._parts.append((module, parameter, values, Record(own.stored(codes.shape[1]))))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model rounded weights inside the block; restore its own, to the bit, afterwards."""
        before = [(parameter.data, RECORDS.get(module)) for module, parameter, *_ in self._parts]
        try:
            for module, parameter, values, record in self._parts:
                parameter.data, RECORDS[module] = values, record
            yield
        finally:
            for (module, parameter, *_), (original, earlier) in zip(self._parts, before, strict=True):
                RECORDS.pop(module, None)
                RECORDS.update({module: earlier} if earlier else {})
                parameter.data = original.to(parameter.device, parameter.dtype)  # the user may have moved the model


def parameter_of(module: nn.Module) -> nn.Parameter:
    """Return the parameter of a projection, or of experts, whose weights can be replaced.

    Raises:
        UserError: they are quantised.
    """
    plain_matrix(module)
    return module.parameter if isinstance(module, ExpertProjection) else module.weight  # type: ignore[return-value]


@contextmanager
def rounded_ffns(model: nn.Module, bits: int | str, text: Calibration | None = None) -> Iterator[None]:
    """Round the FFN weights of a model while the block runs; `prune()` may begin inside.

        with dart_eval.rounded_ffns(model, 4), dart_eval.prune(model, "griffin", 0.5):
            model.generate(**inputs)

    Args:
        model: a Hugging Face causal language model.
        bits: of a weight, 2 to 8; as text also with the weights that share a scale, `"4:64"` (default 32), `"4:row"`.
        text: a `dart_eval.pruning.calibration.Calibration`, which formats such as `"gptq4:32"` look at.

    Raises:
        UserError: other bits, an FFN that is not understood, weights that are quantised already, or a model under a
            method, which may hold copies of its weights.
    """
    refuse_second(model)
    rounding = parse(str(bits))
    if rounding is None:
        yield
        return
    with Rounded(model, rounding, text).in_place():
        yield
