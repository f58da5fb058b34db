"""FFN weights of 16 bits, served as whole numbers while a session runs: what its forwards multiply, prompts too.

The model keeps its weights, which stand in their place again between the forwards of each projection: so nothing can
be lost. What the numbers stand for is made when a projection runs. It is kept for the next time while there is room
(`ROOM`), since a model of 16 bits has twice the bytes of its numbers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, plain_matrix
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.calibration.inputs import squares_of_inputs
from dart_eval.pruning.calibration.made import LastMade
from dart_eval.pruning.calibration.stats_cache import StatsCache
from dart_eval.util.bits import Rounding
from dart_eval.weights import k_quants, rounding
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import as_held, parameter_of, rounded

ROOM = 900_000_000  # bytes of values that may be kept
LARGE = 1 << 20  # weights of a matrix whose numbers are kept on disk, too


class Room:
    """Bytes that are left for values, of all models together."""

    def __init__(self, size: int) -> None:
        self.left = size

    def reserve(self, owner: object, size: int) -> bool:
        """Whether there is room for so many bytes, which are given back when the owner goes."""
        if size > self.left:
            return False
        self.left -= size
        weakref.finalize(owner, self._back, size)
        return True

    def _back(self, size: int) -> None:
        self.left += size


_ROOM = Room(ROOM)


class Decoded:
    """What codes stand for, or their first bits; made anew each time it is asked for where there is no room for it.

    Args:
        packed: [out, in]. dtype: of the values. first: bits of each code that are read; None: all.
        shape: turns a matrix into what is wanted, such as the form in which a parameter holds it.
    """

    def __init__(
        self, packed: Packed, dtype: torch.dtype, first: int | None = None,
        shape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.packed, self.dtype, self.first, self._shape = packed, dtype, first, shape
        self._values: Tensor | None = None

    def __call__(self) -> Tensor:
        """The values."""
        if self._values is not None:
            return self._values
        values = self.packed.decoded(self.dtype, self.first)
        if self._shape is not None:
            values = self._shape(values)
        if _ROOM.reserve(self, values.nbytes):
            self._values = values
        return values


class Serving:
    """The FFN weights of a model as whole numbers, once they are asked to stand in.

    Args:
        ffns: of the model; none where all weights stay as they are.
        wanted: what weights of 16 bits are rounded to; those that are codes already stay.
        orders: per layer [D], the columns of gate and up in the order in which they are served; None: their own.
    """

    def __init__(self, ffns: Sequence[FFN], wanted: Rounding, orders: Sequence[Tensor | None]) -> None:
        self.orders = orders
        self._held: list[tuple[nn.Module, nn.Parameter, Tensor, Packed, Decoded]] = []
        for ffn, order in zip(ffns, orders, strict=False):
            known = {id(module) for module, *_ in self._held}
            for m in ffn.projections:
                if id(m) not in known and not rounding.on_grid(m) and not encoded(m):
                    parameter = parameter_of(m)
                    made = _served(m, wanted, None if m is ffn.down else order)
                    self._held.append((m, parameter, parameter.data, *made))

    def __bool__(self) -> bool:
        """Whether any weights are served so."""
        return bool(self._held)

    def begin(self) -> Sequence[Tensor | None]:
        """From here on projections have codes. Returns `orders`."""
        for module, _, _, packed, _ in self._held:
            rounding.serve(module, packed)
        return self.orders

    def watch(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Install the hooks that put values in the place of weights while a projection runs."""
        for module, parameter, own, _, values in self._held:
            yield module.register_forward_pre_hook(_putting(parameter, values))
            yield module.register_forward_hook(_putting(parameter, functools.partial(_same, own)))

    def end(self) -> None:
        """The model has its own weights, and no codes."""
        for module, parameter, own, _, _ in self._held:
            rounding.serve(module, None)
            parameter.data = own


def serving(wanted: Rounding, ordered: bool, ffns: Sequence[FFN], calibration: Calibration | None) -> Serving:
    """The FFN weights of a model as whole numbers.

    Args:
        wanted: what weights of 16 bits are rounded to. ordered: columns of gate and up in the order of their mean x^2
            on the calibration text.
    """
    orders: list[Tensor | None] = [None] * len(ffns)
    if ordered and calibration is not None:
        orders = [s.argsort(descending=True, stable=True) for s in squares_of_inputs(ffns, calibration)]
    return Serving(ffns, wanted, orders)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _putting(parameter: nn.Parameter, values: Callable[[], Tensor]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        parameter.data = values()

    return torch.compiler.disable(hook)


_MADE: LastMade[tuple[Packed, Decoded]] = LastMade()


def _served(module: nn.Module, wanted: Rounding, order: Tensor | None) -> tuple[Packed, Decoded]:
    """The codes of a projection, and what stands in for its weights; those last made are kept."""

    def make() -> tuple[Packed, Decoded]:
        weight = plain_matrix(module)
        packed = _codes(weight, wanted, order)
        return packed, Decoded(packed, weight.dtype, None, functools.partial(_as_held, weakref.ref(module)))

    return _MADE.get(module, [parameter_of(module)], (wanted, None if order is None else order.tolist()), make)


def _as_held(module: weakref.ref[nn.Module], matrix: Tensor) -> Tensor:
    held = module()
    assert held is not None
    return as_held(held, matrix)


def _codes(weight: Tensor, wanted: Rounding, order: Tensor | None) -> Packed:
    """The codes of a matrix; those of a large one are kept in the cache folder, by a hash of its weights."""
    if weight.is_meta:  # a shape alone
        groups = -(-weight.shape[1] // (wanted.group or weight.shape[1]))
        return Packed(weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), groups), wanted)
    if weight.numel() < LARGE:
        return rounded(weight, wanted, order)
    plain = weight.contiguous().cpu()
    of = {
        "weights": hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest(), "as": wanted.text,
        "dtype": str(weight.dtype), "shape": [*weight.shape], "made by": _made_by(),
        "order": None if order is None else order.tolist(),
    }  # fmt: skip
    kept = StatsCache({}, "codes")
    found = kept.get(of)
    if found is None:
        made = rounded(weight, wanted, order)
        parts = made.codes, made.scales, made.offsets, made.groups
        found = [torch.empty(0) if part is None else part.cpu() for part in parts]
        kept.put(of, found)
    codes, scales, *others = (tensor.to(weight.device) for tensor in found)
    return Packed(codes, scales, wanted, *(tensor if len(tensor) else None for tensor in others))


def _made_by() -> str:
    """A hash of the code that rounds: other code may give other numbers."""
    sources = [inspect.getsource(part) for part in (k_quants, rounded, *rounding.ROUNDS)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()
