"""The weights of a mask's neurons beside the model's own: a pruned FFN is a dense one of K neurons.

While a decoded token runs, copies of the mask's rows of gate and up and columns of down stand in place of the
projections' weights. On a CPU our own kernel multiplies copies of bfloat16 (`RowsProduct`), torch all others. A new
mask copies the rows that changed. The model's own weights are never written to: only the modules' references change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.library import Rows, functions
from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import is_conv1d

ABSENT = object()
Entry = tuple[dict[str, Any], str, Any, Any]


def replacing(module: nn.Module, name: str, value: object) -> Entry:
    """Return the entry that replaces a module's attribute, past `__setattr__`, which takes long."""
    return module.__dict__, name, value, module.__dict__.get(name, ABSENT)


class Swap:
    """Entries of modules' dictionaries that others replace for a while.

    Attributes:
        entries: dictionary, key, the value that replaces, the module's own (`ABSENT`: none).
        runs: whether the modules accept what replaces.
        rows_read: neurons that are read of each matrix.
    """

    runs: bool = True
    rows_read: tuple[float, ...] = ()

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def begin(self) -> None:
        """Put in the values that replace."""
        for owner, key, value, _ in self.entries:
            owner[key] = value

    def end(self) -> None:
        """Restore the module's own."""
        for owner, key, _, own in self.entries:
            if own is ABSENT:
                owner.pop(key, None)
            else:
                owner[key] = own

    def select(self, mask: Tensor) -> int:
        """Follow a new mask, [F] bool; return the number of rows copied."""
        return 0


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Let forwards inside run on what replaces."""
    for swap in swaps:
        swap.begin()
    try:
        yield
    finally:
        for swap in swaps:
            swap.end()


@dataclass
class Slot:
    """A parameter of a projection, and a copy of some neurons' entries.

    Attributes:
        dim: dimension of the neurons.
        halves: entries per neuron (2 if gate and up are one matrix).
        part: the copy; the parameter itself before there is a mask.
    """

    module: Any
    name: str
    dim: int
    halves: int = 1
    own: nn.Parameter = field(init=False)
    part: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.own = self.part = self.module._parameters[self.name]

    def entries_of(self, index: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the entries of rows, or neurons, in a parameter."""
        size = parameter.shape[self.dim] // self.halves
        return index if self.halves == 1 else torch.cat([index + half * size for half in range(self.halves)])

    def taken(self, neurons: Tensor) -> Tensor:
        """Return a copy of the entries of neurons."""
        return self.own.detach().index_select(self.dim, self.entries_of(neurons, self.own))


class RowCopies(Swap):
    """The weights of a mask's neurons of one FFN, beside the model's own.

    Attributes:
        neurons: [K] long, the neuron of each row; None before there is a mask.
        products: by our own kernel, of the projections that it takes.
    """

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn
        self.neurons: Tensor | None = None
        self.slots = [Slot(ffn.down, "weight", int(not is_conv1d(ffn.down)))]  # neurons are inputs of down
        for module in (m for m in (ffn.gate, ffn.up) if m is not None):
            self.slots.append(Slot(module, "weight", int(is_conv1d(module)), 2 if ffn.fused else 1))
            if getattr(module, "bias", None) is not None:
                self.slots.append(Slot(module, "bias", 0, 2 if ffn.fused else 1))
        self.link()

    def link(self) -> None:
        """Point entries and kernels at the weights that are multiplied now."""
        self.entries, self.products = [], []
        parts: dict[nn.Module, dict[str, Tensor]] = {m: dict(m.named_parameters()) for m in self.ffn.projections}
        for slot in self.slots:
            parts[slot.module][slot.name] = slot.part
            self.entries.append((slot.module._parameters, slot.name, slot.part, slot.own))
            if is_conv1d(slot.module) and slot.module is not self.ffn.down:  # its forward uses the number of outputs
                width = slot.part.shape[slot.dim]
                self.entries.append((slot.module.__dict__, "nf", width, slot.own.shape[slot.dim]))
        for module, part in parts.items():
            weight, bias = part["weight"].detach(), None if (b := part.get("bias")) is None else b.detach()
            if not is_conv1d(module) and why_no_kernel(weight, bias) is None:
                self.products.append(RowsProduct(weight, bias))
                self.entries.append(replacing(module, "forward", self.products[-1]))

    @property
    def count(self) -> int:
        """Neurons in the mask."""
        return self.ffn.size if self.neurons is None else len(self.neurons)

    @property
    def runs(self) -> bool:  # type: ignore[override]
        """Whether the projections accept this number of neurons: Conv1D takes no input of size 0."""
        return self.count > 0 or not is_conv1d(self.ffn.down)

    @property
    def linked(self) -> bool:
        """Whether our own kernel multiplies every projection."""
        return len(self.products) == len(self.ffn.projections)

    @property
    def rows_read(self) -> tuple[float, ...]:  # type: ignore[override]
        """Neurons that are read of each matrix."""
        return (self.count,) * self.ffn.matrices

    @torch.inference_mode(False)  # or a later forward outside of it could not change the copies
    @torch.no_grad()
    def select(self, mask: Tensor) -> int:
        mask = mask.to(next(self.ffn.down.parameters()).device)
        before, self.neurons = self.neurons, None  # until all is copied: what breaks here leaves rows of no mask
        wanted = mask.nonzero().flatten()
        if before is None or len(wanted) != len(before):
            for slot in self.slots:
                slot.part = nn.Parameter(slot.taken(wanted), requires_grad=False)
            self.link()
            self.neurons = wanted
            return len(wanted)
        rows = (~mask[before]).nonzero().flatten()
        new = mask.index_fill(0, before, False).nonzero().flatten()
        for slot in self.slots:  # the copy keeps its address
            slot.part.detach().index_copy_(slot.dim, slot.entries_of(rows, slot.part), slot.taken(new))
        self.neurons = before.index_copy(0, rows, new)
        return len(new)


def copies_bytes(ffn: FFN, neurons: int) -> int:
    """Return the bytes of copies of some neurons' weights, and of their numbers."""
    parameters = [p for m in (ffn.gate, ffn.up) if m is not None for p in m.parameters()]
    weights: Any = ffn.down.weight
    return neurons * ((weights.nbytes + sum(p.nbytes for p in parameters)) // ffn.size + torch.long.itemsize)


class RowsProduct:
    """x -> weight x + bias. Anything but one token goes to torch.

    Args:
        weight: [rows, width]. It is read where it lies, so that new values in it count.
        bias: [rows], or None.
        level: `avx2`, `avx512`, or None for the best that there is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, level: str | None = None) -> None:
        self.weight, self.bias = weight, bias
        pointers = weight.data_ptr(), bias.data_ptr() if bias is not None else None
        self._job = Rows(*pointers, None, None, *weight.shape)
        self._call, self._level = functions()[Rows.function], build.level(level)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., rows]."""
        rows, width = self.weight.shape
        is_token = x.numel() == width > 0 and x.dtype == torch.bfloat16 and not x.requires_grad
        if not is_token or torch.compiler.is_compiling():
            return linear(x, self.weight, self.bias)
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
        job = Rows.from_buffer_copy(self._job)  # of this call alone: others may run at the same time
        job.x, job.out = x.data_ptr(), out.data_ptr()
        self._call(ctypes.byref(job), self._level, torch.get_num_threads())
        return out


def why_no_kernel(weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why a product is torch's own, or None."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return "the product is for rows of bfloat16 on a CPU"
    if bias is not None and (bias.dtype != torch.bfloat16 or not bias.is_contiguous()):
        return "the product is for a bias of bfloat16"
    return build.why_no_kernel()
