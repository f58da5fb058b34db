"""Codes that depend on a calibration text, made in one forward of the model over all of it.

Before a projection runs, its inputs on all tokens are there, made by the layers before it as they are rounded already
(sequential GPTQ): they decide its codes, and it runs on these. With importance weights (`k_quants`) nothing is in
place before the end, and a column counts by the mean square of its inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from dart_eval.layers.experts import ExpertProjection
from dart_eval.layers.find import base_of
from dart_eval.layers.projection import input_device, is_conv1d, plain_matrix
from dart_eval.layers.verify import evaluating
from dart_eval.util.bits import IMATRIX, Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights import gptq
from dart_eval.weights.codes import Packed

if TYPE_CHECKING:
    from dart_eval.pruning.calibration import Calibration

# Tokens of a text that are read at most, as one batch. An 8B model (FFNs of 14336) then takes 3 GB for what an FFN
# computes in 16 bits, and 5 GB for H of its down projection and the factor.
MOST = 32768
PART = 4096  # tokens whose inputs are in fp32 at a time
Place: TypeAlias = "tuple[nn.Module, nn.Parameter, Rounding]"  # a projection, its parameter, and how it is rounded


def laid_out(module: nn.Module, values: Tensor) -> Tensor:
    """Return a matrix [out, in] in the layout of a projection's parameter."""
    if isinstance(module, ExpertProjection):
        return module.stored(values)
    return values.T.contiguous() if is_conv1d(module) else values


@torch.no_grad()
def calibrated(
    model: nn.Module, places: Sequence[Place], name: str, text: Calibration | None,
    by_squares: Callable[[Tensor, Rounding, Tensor], Packed],
) -> list[Packed]:  # fmt: skip
    """Return the codes of a model's projections, computed once for a text and the name of a format.

    Args:
        by_squares: rounds a matrix by importance weights, from the mean squares [in] of its inputs.

    Raises:
        UserError: there is no text, or the model calls a projection in another way.
    """
    if text is None:
        raise UserError(f"{name} is calibrated on a text, and none is given", "use q4_k, or give text=")
    found: dict[nn.Module, Packed] = {}
    last: tuple[object, int, tuple[Tensor, Tensor]] | None = None  # gate and up have the same inputs

    def run(place: Place, given: Tensor, counts: Tensor) -> None:
        nonlocal last
        module, parameter, rounding = place
        matrix = plain_matrix(module)
        width = matrix.shape[1]
        group = min(rounding.group, width) or width
        inputs = given.reshape(-1, width)[counts.to(given.device)]
        if rounding.by == IMATRIX:
            sums = [part.float().square().sum(0) for part in inputs.split(PART)]
            found[module] = by_squares(matrix, rounding, torch.stack(sums).sum(0) / len(inputs))
            return
        if last is None or last[0] is not given or last[1] != group:
            hessian = torch.zeros(width, width, device=matrix.device)
            for part in inputs.split(PART):
                hessian.addmm_(part.float().T, part.float())
            last = given, group, gptq.factor_of(hessian, group)
        found[module] = gptq.quantised(matrix, *last[2], rounding)
        parameter.data = laid_out(module, found[module].decoded(matrix.dtype))

    def measure() -> list[Tensor]:
        ids, counts = text.batch(MOST)
        originals = [parameter.data for _, parameter, _ in places]
        with contextlib.ExitStack() as inside:
            inside.enter_context(evaluating(model))
            for place in places:
                hook = functools.partial(run, place, counts=counts.flatten())
                inside.enter_context(place[0].register_forward_pre_hook(lambda _, given, hook=hook: hook(given[0])))
            try:
                base_of(model)(input_ids=ids.to(input_device(model)), use_cache=False)
            finally:
                for (_, parameter, _), original in zip(places, originals, strict=True):
                    parameter.data = original
        if missing := [type(module).__name__ for module, *_ in places if module not in found]:
            raise UserError(f"a {missing[0]} of an FFN is not called as a module: no text calibrates it", "use q4_k")
        packed = (found[module] for module, *_ in places)
        return [part for one in packed for part in (one.codes, one.scales, one.offsets) if part is not None]

    tensors, packed = text.kept(f"codes {name}", measure), []
    each = len(tensors) // len(places)  # Q3_K has no offsets
    for i, (_, parameter, rounding) in enumerate(places):
        codes, scales, *offsets = (tensor.to(parameter.device) for tensor in tensors[i * each : (i + 1) * each])
        packed.append(Packed(codes, scales, rounding, *offsets))
    return packed
