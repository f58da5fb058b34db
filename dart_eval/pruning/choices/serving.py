"""16-bit FFN weights served as integer codes while a session runs, to prompts too.

The model keeps its weights, which are back in place between the forwards of each projection, so nothing can be lost.
A projection decodes its codes when it runs. Decoded values take twice the bytes of the codes or more. They are cached
up to `ROOM`, and beyond that in a CPU's memory while half of it stays free: decoding takes longer than a product.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, plain_matrix
from dart_eval.pruning.calibration.stats_cache import StatsCache
from dart_eval.pruning.calibration.weight_cache import WeightCache
from dart_eval.util import machine
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights import k_quants, rounding
from dart_eval.weights.codes import Packed
from dart_eval.weights.rounding import as_held, parameter_of, rounded

ROOM = 900_000_000  # bytes of cached values, however little memory is free
LARGE = 1 << 20  # weights of a matrix whose codes are cached on disk, too


class Room:
    """Bytes that are free for cached values, over all models; below 0 once the machine's spare memory is in use."""

    def __init__(self, size: int) -> None:
        self.free_bytes = size

    def reserve(self, owner: object, size: int, device: torch.device) -> bool:
        """Reserve bytes of a device until the owner is deleted; return whether there is room."""
        if size > self.free_bytes and not (device.type == "cpu" and _spare(size)):
            return False
        self.free_bytes -= size
        weakref.finalize(owner, self._back, size)
        return True

    def _back(self, size: int) -> None:
        self.free_bytes += size


def _spare(size: int) -> bool:
    """Whether half of the machine's memory stays free if `size` bytes of it are taken."""
    found = machine.memory()
    return found is not None and found[0] - size >= found[1] / 2


_ROOM = Room(ROOM)
_DECODED: weakref.WeakKeyDictionary[Packed, weakref.WeakSet[Decoded]] = weakref.WeakKeyDictionary()


class Decoded:
    """The values of codes or of their first bits, decoded on each call unless there is room to cache them.

    Args:
        packed: [out, in].
        dtype: of the values.
        first: bits of each code that are read; None: all.
        shape: turns the matrix into the form in which a parameter holds it.
        whole: as of `Packed.decoded`.
    """

    def __init__(
        self, packed: Packed, dtype: torch.dtype, first: int | None = None,
        shape: Callable[[Tensor], Tensor] | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        self.packed, self.dtype, self.first, self._shape, self.whole = packed, dtype, first, shape, whole
        self._values: Tensor | None = None
        _DECODED.setdefault(packed, weakref.WeakSet()).add(self)

    def __call__(self) -> Tensor:
        """Return the values."""
        if self._values is not None:
            return self._values
        with torch.inference_mode(False):  # the values outlive this forward
            values = self.packed.decoded(self.dtype, self.first, self.whole)
            if self._shape is not None:
                values = self._shape(values)
        if not self.packed.moved and _ROOM.reserve(self, values.nbytes, values.device):
            self._values = values
        return values


def move(packed: Packed, made: Callable[[], Tensor]) -> None:
    """Free codes, and the values that were decoded from them: others hold the codes, and make them anew at each use."""
    packed.move(made)
    for values in _DECODED.get(packed, ()):
        values._values = None


@dataclass
class _Held:
    """A projection that is served: its parameter, the weights of this between forwards, codes, and their values.

    block: its decoder layer.
    dropped: its own weights are gone (`Serving.drop`).
    """

    module: nn.Module
    block: nn.Module
    parameter: nn.Parameter
    own: Tensor
    packed: Packed
    values: Decoded
    dropped: bool = False
    shown: bool = False  # the parameter has the codes' values

    def show(self, *_: object) -> None:
        """Give the parameter the values of the codes."""
        self.shown, self.parameter.data = True, self.values()

    def hide(self, *_: object) -> None:
        """Give the parameter what it has between forwards. What the user has put there meanwhile stays."""
        if self.shown:
            self.shown, self.parameter.data = False, self.own


class Serving:
    """The FFN weights of a model as codes, which replace the weights between `begin` and `end`.

    Args:
        ffns: of the model.
        wanted: the rounding of 16-bit weights; weights that are codes already stay.
        orders: per layer [D], the stored order of the columns of gate and up; None: their own.
    """

    def __init__(self, ffns: Sequence[FFN], wanted: Rounding, orders: Sequence[Tensor | None]) -> None:
        self.orders = orders
        self._held: list[_Held] = []
        for ffn, order in zip(ffns, orders, strict=False):
            held = {id(h.module) for h in self._held}
            for m in ffn.projections:
                if id(m) not in held and not rounding.on_grid(m) and not encoded(m):
                    parameter = parameter_of(m)
                    codes = _served(m, wanted, None if m is ffn.down else order)
                    self._held.append(_Held(m, ffn.holder, parameter, parameter.data, *codes))

    def __bool__(self) -> bool:
        """Whether any weights are served as codes."""
        return bool(self._held)

    def begin(self) -> Sequence[Tensor | None]:
        """Give projections their codes. Return `orders`."""
        for held in self._held:
            rounding.serve(held.module, held.packed)
        return self.orders

    def watch(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Install the hooks that replace a projection's weights by decoded values while it runs."""
        for held in self._held:
            yield held.module.register_forward_pre_hook(torch.compiler.disable(held.show))
            yield held.module.register_forward_hook(torch.compiler.disable(held.hide))
            yield held.block.register_state_dict_pre_hook(functools.partial(_refuse_to_save, held))

    def drop(self) -> None:
        """Free the model's own weights: parameters are empty between forwards, and have the codes' values after."""
        for held in self._held:
            held.dropped = True
            held.own = held.parameter.data = held.own.new_zeros(1).expand(held.own.shape)

    def put_back(self) -> None:
        """Give parameters the weights that they have between forwards, if an exception has left others there."""
        for held in self._held:
            held.hide()

    def end(self) -> None:
        """Give the model its own weights, or what is left of them (`drop`), and no codes."""
        for held in self._held:
            rounding.serve(held.module, None)
            held.hide()
            if held.dropped:
                held.dropped = False
                if held.parameter.data_ptr() == held.own.data_ptr():
                    held.parameter.data = held.values()
                held.own = held.parameter.data


def _refuse_to_save(held: _Held, *_: object) -> None:
    """Refuse a state dict in which weights that are gone would be zeros."""
    if held.dropped:
        raise UserError("serve='codes' keeps no FFN weights that could be saved", "save the model after the block")


_CACHE: WeightCache[tuple[Packed, Decoded]] = WeightCache()


def _served(module: nn.Module, wanted: Rounding, order: Tensor | None) -> tuple[Packed, Decoded]:
    """Return the codes of a projection and their values, cached for the next session."""

    def make() -> tuple[Packed, Decoded]:
        weight = plain_matrix(module)
        packed = _codes(weight, wanted, order)
        return packed, Decoded(packed, weight.dtype, None, functools.partial(_as_held, weakref.ref(module)))

    return _CACHE.get(module, [parameter_of(module)], (wanted, None if order is None else order.tolist()), make)


def _as_held(module: weakref.ref[nn.Module], matrix: Tensor) -> Tensor:
    held = module()
    assert held is not None
    return as_held(held, matrix)


def _codes(weight: Tensor, wanted: Rounding, order: Tensor | None) -> Packed:
    """Return the codes of a matrix; those of a large one are cached on disk by a hash of its weights."""
    if weight.is_meta or weight.numel() < LARGE:
        return rounded(weight, wanted, order)
    plain = weight.contiguous().cpu()
    of = {
        "weights": hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest(), "as": wanted.text,
        "dtype": str(weight.dtype), "shape": [*weight.shape], "made by": _made_by(),
        "order": None if order is None else order.tolist(),
    }  # fmt: skip
    cache = StatsCache({}, "codes")
    tensors = cache.get(of)
    if tensors is None:
        packed = rounded(weight, wanted, order)
        parts = packed.codes, packed.scales, packed.offsets, packed.groups
        tensors = [torch.empty(0) if part is None else part.cpu() for part in parts]
        cache.put(of, tensors)
    codes, scales, *others = (tensor.to(weight.device) for tensor in tensors)
    return Packed(codes, scales, wanted, *(tensor if len(tensor) else None for tensor in others))


def _made_by() -> str:
    """Return a hash of the code that rounds, since other code may give other numbers."""
    sources = [inspect.getsource(part) for part in (k_quants, rounded, *rounding.ROUNDS)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()
