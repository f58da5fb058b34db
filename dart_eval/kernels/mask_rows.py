"""Decoding on copies of a mask's rows: a pruned FFN is a dense one of K neurons.

While a decoded token runs, copies of the mask's rows of gate and up and columns of down replace the projections'
weights. On a CPU our own kernel multiplies copies of bfloat16 (`cpu.rows`), torch all others. The model's own weights
are never written to, so only the module's references must be restored. A new mask copies the rows that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.kernels.cpu.rows import RowsProduct, why_no_kernel
from dart_eval.kernels.forward import Forward
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, is_conv1d


@dataclass
class Slot:
    """A parameter of a projection: the model's own, or a copy of some neurons' entries.

    Attributes:
        dim: dimension of the neurons.
        halves: entries per neuron (2 if gate and up are one matrix).
        features: attribute with the module's number of outputs, if its forward uses it (Conv1D).
        own: the model's parameter.
        part: the copy, once there is a mask.
    """

    module: Any
    name: str
    dim: int
    halves: int = 1
    features: str | None = None
    own: nn.Parameter = field(init=False)
    part: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.own = self.part = self.module._parameters[self.name]

    def copy(self, neurons: Tensor) -> None:
        """Copy these neurons."""
        size = self.own.shape[self.dim] // self.halves
        entries = self.own.detach().index_select(self.dim, _of_halves(neurons, self.halves, size))
        self.part = nn.Parameter(entries, requires_grad=False)

    def change(self, rows: Tensor, neurons: Tensor) -> None:
        """Overwrite rows of the copy with these neurons; the copy keeps its address."""
        size, count = (p.shape[self.dim] // self.halves for p in (self.own, self.part))
        new = self.own.detach().index_select(self.dim, _of_halves(neurons, self.halves, size))
        self.part.detach().index_copy_(self.dim, _of_halves(rows, self.halves, count), new)

    def put(self, parameter: nn.Parameter) -> None:
        """Let the module multiply with this parameter."""
        # Not by attribute: a module's __setattr__ would take longer than all the rest.
        self.module._parameters[self.name] = parameter
        if self.features is not None:
            setattr(self.module, self.features, parameter.shape[self.dim])


def _of_halves(index: Tensor, halves: int, size: int) -> Tensor:
    return index if halves == 1 else torch.cat([index + half * size for half in range(halves)])


def _slots(ffn: FFN) -> list[Slot]:
    """Return the slots of gate, up and down. Neurons are outputs of the first two, and inputs of down."""
    slots = [Slot(ffn.down, "weight", int(not is_conv1d(ffn.down)))]
    for module in (m for m in (ffn.gate, ffn.up) if m is not None):
        conv, halves = is_conv1d(module), 2 if ffn.fused else 1
        slots.append(Slot(module, "weight", int(conv), halves, "nf" if conv else None))
        if getattr(module, "bias", None) is not None:
            slots.append(Slot(module, "bias", 0, halves))
    return slots


class MaskRows:
    """The weights of a mask's neurons of one FFN, beside the model's own.

    Attributes:
        neurons: [K] long, the neuron of each row; None before there is a mask.
    """

    def __init__(self, ffn: FFN) -> None:
        self.ffn = ffn
        self.neurons: Tensor | None = None
        self._slots = _slots(ffn)
        self._forwards = {m: Forward(m) for m in ffn.projections}
        self._products: dict[nn.Module, RowsProduct] = {}  # by our kernel, of the projections that it takes

    @property
    def count(self) -> int:
        """Neurons in the mask."""
        return self.ffn.size if self.neurons is None else len(self.neurons)

    @property
    def runs(self) -> bool:
        """Whether the projections accept this number of neurons: Conv1D takes no input of size 0."""
        return self.count > 0 or not is_conv1d(self.ffn.down)

    @property
    def products(self) -> list[RowsProduct]:
        """The products of our own kernel, after `link`."""
        return [*self._products.values()]

    @property
    def linked(self) -> bool:
        """Whether our own kernel multiplies every projection (`link`)."""
        return len(self._products) == len(self.ffn.projections)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(slot.part.nbytes for slot in self._slots if slot.part is not slot.own)

    @property
    def rows_read(self) -> tuple[float, ...]:
        """Neurons that are read of each matrix."""
        return (self.count,) * self.ffn.matrices

    @torch.inference_mode(False)  # or a later forward outside of it could not change the copies
    @torch.no_grad()
    def select(self, mask: Tensor) -> int:
        """Copy the neurons of `mask` ([F] bool); return the number of rows copied."""
        mask = mask.to(next(self.ffn.down.parameters()).device)
        held, self.neurons = self.neurons, None  # until all is copied: what breaks here leaves rows of no mask
        wanted = mask.nonzero().flatten()
        if held is None or len(wanted) != len(held):
            self._copy(wanted)
            self.neurons = wanted
            return len(wanted)
        rows = (~mask[held]).nonzero().flatten()
        new = mask.index_fill(0, held, False).nonzero().flatten()
        self._change(rows, new)
        self.neurons = held.index_copy(0, rows, new)
        return len(new)

    def _copy(self, neurons: Tensor) -> None:
        for slot in self._slots:
            slot.copy(neurons)
        self.link()

    def link(self) -> None:
        """Point the kernel at the weights that are multiplied now."""
        parts: dict[nn.Module, dict[str, Tensor]] = {m: dict(m.named_parameters()) for m in self.ffn.projections}
        for slot in self._slots:
            parts[slot.module][slot.name] = slot.part
        self._products = {
            m: RowsProduct(p["weight"].detach(), b if (b := p.get("bias")) is None else b.detach())
            for m, p in parts.items()
            if not is_conv1d(m) and why_no_kernel(p["weight"], p.get("bias")) is None
        }

    def _change(self, rows: Tensor, neurons: Tensor) -> None:
        for slot in self._slots:
            slot.change(rows, neurons)

    def begin(self) -> None:
        """Let the projections multiply the mask's neurons."""
        for slot in self._slots:
            slot.put(slot.part)
        for module, product in self._products.items():
            self._forwards[module].replace(product)

    def end(self) -> None:
        """Restore the projections' own weights."""
        for module in self._products:
            self._forwards[module].put_back()
        for slot in self._slots:
            slot.put(slot.own)


@contextmanager
def multiplied(ffns: Sequence[MaskRows]) -> Iterator[None]:
    """Let forwards inside multiply these rows."""
    for rows in ffns:
        rows.begin()
    try:
        yield
    finally:
        for rows in ffns:
            rows.end()


def unlike_plain(ffns: Sequence[FFN]) -> str | None:
    """Return why the rows of these projections' weights cannot be copied, or None."""
    seen: dict[int, FFN] = {}
    for ffn in ffns:
        if ffn.routed is not None:
            return f"the experts of layer {ffn.number} are one module, which has no kernels yet"
        if ffn.norm is not None:
            return f"the FFN of layer {ffn.number} has a norm of its neurons, which has no kernels yet"
        for module in ffn.projections:
            if reason := _unlike_plain(module):
                return f"{type(module).__name__} (layer {ffn.number}) {reason}"
            other = seen.setdefault(id(module), ffn)
            if other is not ffn:
                return f"layers {other.number} and {ffn.number} have one FFN, which cannot keep neurons for each"
    return None


def _unlike_plain(module: nn.Module) -> str | None:
    """Return why a projection is not a plain one, or None."""
    if reason := encoded(module):
        return f"has weights that {reason}"
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return "has weights that are computed on the fly or held elsewhere"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "is not torch's own linear layer"
    # accelerate wraps the forward of every module of a model that is spread over devices.
    own = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "has a forward of its own, which may quantise what it is given"
    return None
