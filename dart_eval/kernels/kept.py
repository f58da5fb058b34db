"""Decoding on copies of the kept rows: a pruned FFN is a dense one of K neurons.

While a decoded token runs, copies of the kept rows of gate and up and of the kept columns of down stand in the place of
the projections' weights. The model's own weights are never written to, so that nothing has to be put back but their
names. A new mask copies the rows that changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.ffn import FFN
from dart_eval.layers.projection import encoded, is_conv1d


@dataclass
class Slot:
    """A parameter of a projection: the model's own, or a copy of the entries of some neurons.

    Attributes:
        dim: along which neurons lie. halves: how many entries a neuron has (2 where gate stands above up).
        features: the attribute where the module keeps the number of its outputs, if its forward uses it (Conv1D).
        own: the model's. part: the copy, once a mask is there.
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
        """The copy is that of these neurons."""
        size = self.own.shape[self.dim] // self.halves
        found = self.own.detach().index_select(self.dim, _of_halves(neurons, self.halves, size))
        self.part = nn.Parameter(found, requires_grad=False)

    def change(self, rows: Tensor, neurons: Tensor) -> None:
        """At these rows of the copy are these neurons now; it stays where it is in memory."""
        size, count = (p.shape[self.dim] // self.halves for p in (self.own, self.part))
        new = self.own.detach().index_select(self.dim, _of_halves(neurons, self.halves, size))
        self.part.detach().index_copy_(self.dim, _of_halves(rows, self.halves, count), new)

    def put(self, parameter: nn.Parameter) -> None:
        """The module multiplies with this one."""
        # Not by attribute: a module's __setattr__ would take longer than all the rest.
        self.module._parameters[self.name] = parameter
        if self.features is not None:
            setattr(self.module, self.features, parameter.shape[self.dim])


def _of_halves(index: Tensor, halves: int, size: int) -> Tensor:
    return index if halves == 1 else torch.cat([index + half * size for half in range(halves)])


def _slots(ffn: FFN) -> list[Slot]:
    """Of gate, up and down. Neurons are outputs of the first two, and inputs of down."""
    into = [m for m in (ffn.gate, ffn.up) if m is not None]
    made = [Slot(ffn.down, "weight", int(not is_conv1d(ffn.down)))]
    for module in into:
        conv, halves = is_conv1d(module), 2 if ffn.fused else 1
        made.append(Slot(module, "weight", int(conv), halves, "nf" if conv else None))
        if getattr(module, "bias", None) is not None:
            made.append(Slot(module, "bias", 0, halves))
    return made


class KeptRows:
    """The weights of the kept neurons of one FFN, beside the model's own.

    Attributes:
        neurons: [K] long, which neuron each row is of; None before there is a mask.
    """

    def __init__(self, ffn: FFN) -> None:
        self.ffn = ffn
        self.neurons: Tensor | None = None
        self._slots = _slots(ffn)

    @property
    def count(self) -> int:
        """Kept neurons."""
        return self.ffn.size if self.neurons is None else len(self.neurons)

    @property
    def runs(self) -> bool:
        """Whether the projections' forwards take so many neurons: Conv1D takes no input of size 0."""
        return self.count > 0 or not is_conv1d(self.ffn.down)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(slot.part.nbytes for slot in self._slots if slot.part is not slot.own)

    @property
    def rows_read(self) -> tuple[float, ...]:
        """Neurons of which each matrix is read."""
        return (self.count,) * self.ffn.matrices

    @torch.no_grad()
    def select(self, mask: Tensor) -> int:
        """Keep the neurons of `mask` ([F] bool); returns how many rows were copied."""
        mask = mask.to(next(self.ffn.down.parameters()).device)
        wanted = mask.nonzero().flatten()
        if self.neurons is None or len(wanted) != len(self.neurons):
            self.neurons = wanted
            self._copy(wanted)
            return len(wanted)
        rows = (~mask[self.neurons]).nonzero().flatten()
        new = mask.index_fill(0, self.neurons, False).nonzero().flatten()
        self.neurons = self.neurons.index_copy(0, rows, new)
        self._change(rows, new)
        return len(new)

    def _copy(self, neurons: Tensor) -> None:
        for slot in self._slots:
            slot.copy(neurons)

    def _change(self, rows: Tensor, neurons: Tensor) -> None:
        for slot in self._slots:
            slot.change(rows, neurons)

    def begin(self) -> None:
        """The projections multiply the kept neurons."""
        for slot in self._slots:
            slot.put(slot.part)

    def end(self) -> None:
        """The projections have their own weights."""
        for slot in self._slots:
            slot.put(slot.own)


def unlike_plain(ffns: Sequence[FFN]) -> str | None:
    """Why these projections have no plain weights of which rows could be copied, or None."""
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
    """What keeps a projection from being a plain one, or None."""
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
