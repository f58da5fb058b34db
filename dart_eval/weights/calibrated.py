"""Codes that depend on a calibration text, made in one forward of the model over all of it.

Before a projection runs, its inputs on all tokens are there, made by the layers before it as they are rounded already
(sequential GPTQ): they decide its codes, and it runs on these. With importance weights (`k_quants`) nothing is rounded
before the end, and a column counts by the mean square of its inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import ExpertProjection
from dart_eval.layers.find import base_of
from dart_eval.layers.projection import input_device, is_conv1d, plain_matrix
from dart_eval.layers.verify import evaluating
from dart_eval.util.bits import GPTQ, Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights import gptq
from dart_eval.weights.codes import Packed

# Tokens of a text that are read, at most. They are one batch: an FFN of 14336 neurons holds about 3 GB of inputs and
# products of 32768 tokens in 16 bits, and as much for H of its down projection and the factor (0.8 + 1.6 GB).
MOST = 32768
PART = 4096  # tokens whose inputs are in fp32 at a time


class Text(Protocol):
    """What is known of the calibration text: `pruning.calibration.Calibration`."""

    def batch(self, most: int) -> tuple[Tensor, Tensor]:
        """Return passages [n, T], and which of their tokens count, [n, T] bool. most: tokens that count."""

    def kept(self, name: str, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what `measure` returns, or has returned earlier under this name."""


class Place(NamedTuple):
    """A projection that is to be rounded, its parameter, and how."""

    module: nn.Module
    parameter: nn.Parameter
    rounding: Rounding


def laid_out(module: nn.Module, values: Tensor) -> Tensor:
    """Return a matrix [out, in] in the layout of a projection's parameter."""
    if isinstance(module, ExpertProjection):
        return module.stored(values)
    return values.T.contiguous() if is_conv1d(module) else values


def calibrated(
    model: nn.Module, places: Sequence[Place], name: str, text: Text | None,
    by_importance: Callable[[Tensor, Rounding, Tensor], Packed],
) -> list[Packed]:  # fmt: skip
    """Return the codes of a model's projections. They are computed once for a text, which keeps them.

    Args:
        places: all that is rounded.
        name: of the format.
        text: None: there is none.
        by_importance: rounds a matrix by the mean squares [in] of its inputs.

    Raises:
        UserError: there is no text, or a projection does not run in the model's forward.
    """
    if text is None:
        raise UserError(f"{name} is calibrated on a text, and none is given", "use 4 or q4_k, or see docs/python.md")

    def measure() -> list[Tensor]:
        packed = _made(model, places, text, by_importance)
        return [part.cpu() for one in packed for part in (one.codes, one.scales, one.offsets) if part is not None]

    tensors = iter(text.kept(f"codes {name}", measure))
    packed = []
    for _, parameter, own in places:
        count = 2 if own.k and own.bits == 3 else 3  # Q3_K has no minima
        codes, scales, *offsets = (next(tensors).to(parameter.device) for _ in range(count))
        packed.append(Packed(codes, scales, own, *offsets))
    return packed


@torch.no_grad()
def _made(
    model: nn.Module, places: Sequence[Place], text: Text,
    by_importance: Callable[[Tensor, Rounding, Tensor], Packed],
) -> list[Packed]:  # fmt: skip
    """Compute the codes in one forward. Arguments as of `calibrated`."""
    ids, counts = text.batch(MOST)
    found: dict[nn.Module, Packed] = {}
    last: tuple[Tensor, int, gptq.Factor] | None = None  # gate and up have the same inputs
    originals = [place.parameter.data for place in places]

    def run(place: Place, given: Tensor) -> None:
        nonlocal last
        module, parameter, own = place
        matrix = plain_matrix(module)
        group = min(own.group, matrix.shape[1]) or matrix.shape[1]
        inputs = given.reshape(-1, given.shape[-1])[counts.flatten().to(given.device)]
        if own.by != GPTQ:
            found[module] = by_importance(matrix, own, inputs.float().square().mean(0))
            return
        if last is None or last[0] is not given or last[1] != group:
            hessian = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
            for part in inputs.split(PART):
                hessian.addmm_(part.float().T, part.float())
            last = given, group, gptq.factor_of(hessian, group)
        found[module] = gptq.quantised(matrix, last[2], own)
        parameter.data = laid_out(module, found[module].decoded(matrix.dtype))

    with contextlib.ExitStack() as inside:
        inside.enter_context(evaluating(model))
        for place in places:
            hook = place.module.register_forward_pre_hook(lambda _module, given, place=place: run(place, given[0]))
            inside.enter_context(hook)
        try:
            base_of(model)(input_ids=ids.to(input_device(model)), use_cache=False)
        finally:
            for place, original in zip(places, originals, strict=True):
                place.parameter.data = original
    missing = next((place.module for place in places if place.module not in found), None)
    if missing is not None:
        raise UserError(
            f"{type(missing).__name__} of an FFN does not run in the model's forward, so that nothing calibrates it",
            "use a format without calibration, such as q4_k",
        )
    return [found[place.module] for place in places]
