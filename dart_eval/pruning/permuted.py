"""Execution `permuted`: kept neurons are moved, in place, into the first K rows, and the FFN multiplies slices.

The order of an FFN's neurons is free: rows of gate and up and columns of down may change places together. Swapping the
kept neurons to the front makes a pruned FFN a dense one of K neurons, on a view of the same memory: no second copy of
the weights, and shapes and addresses that do not change while K does not. A new mask swaps only what changed.

Down keeps its layout, [D, F] with neurons as columns. As rows of a transposed down a swap would be cheaper, but a
product with the first K rows takes torch 1.6 to 1.9 times as long as one with the first K columns in bfloat16 on a CPU
(docs/findings.md), and products are what every token pays.

A swap that is interrupted (Ctrl-C) can always be finished: what a step is about to write is remembered before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dart_eval.errors import UserError
from dart_eval.ffn import FFN, is_conv1d
from dart_eval.pruning.gather import GatheredFFN

PAIRS = 128  # neurons of each side that one step swaps, where neurons are rows
COLUMN_ROWS = 64  # rows that one step handles, where neurons are columns: few enough to stay in the cache


@dataclass(frozen=True)
class _Bank:
    """A tensor with one entry of every neuron along `dim`: a view of a parameter."""

    tensor: Tensor
    dim: int


@dataclass
class _Swap:
    """Neurons at rows `a` change places with those at rows `b` in every bank of a layer, step by step.

    at: steps done, and what the next one was about to write (None: not yet read). One assignment moves it on, so that
    an interrupt between any two operations leaves either the old state or the new one.
    """

    layer: int
    steps: list[tuple[Tensor, int, Tensor, Tensor]]  # view, dim, where to read, where to write
    after: Tensor  # the layer's order when all is done
    at: tuple[int, Tensor | None] = (0, None)


class PermutedFFNs:
    """All FFNs of a model, their neurons in an order of our choice.

    Nothing is changed before `begin()`, and `restore()` undoes everything. Between `slice()` and `whole()` the
    projections multiply the first `kept` neurons alone.

    Args:
        gather: down is stored transposed meanwhile (in its own memory; one layer's copy is held while it is turned),
            and tokens of one sequence multiply the neurons that they pick alone (`gather.py`).

    Raises:
        UserError: weights are shared with other modules.
    """

    def __init__(self, ffns: Sequence[FFN], model: nn.Module, gather: bool = False) -> None:
        if reason := quantised(ffns) or shared(ffns, model):
            raise UserError(reason, "use execution='masked'")
        if any(f.order is not None for f in ffns):
            raise UserError("the neurons of this model are reordered by another prune()", "leave that one first")
        self.ffns = list(ffns)
        self.kept = [f.size for f in ffns]
        self._swap: _Swap | None = None
        self._turn: tuple[int, Tensor, bool] | None = None  # a layer's down under way: layer, its values, transposed
        self._turned: list[int] = []
        self.gathered = [GatheredFFN(f) for f in ffns] if gather else []
        self._banks = [_banks(f, gather) for f in ffns]
        self._slots: list[Any] = list(self.gathered) or [slot for f in ffns for slot in _slots(f)]

    @torch.no_grad()
    def begin(self) -> None:
        """Take the neurons over."""
        for ffn in self.ffns:
            ffn.order = torch.arange(ffn.size, dtype=torch.int32, device=next(ffn.down.parameters()).device)
        if self.gathered:
            for layer in range(len(self.ffns)):
                self._transpose(layer, True)

    @torch.no_grad()
    def select(self, layer: int, mask: Tensor) -> int:
        """Move the neurons of `mask` ([F] bool, by neuron) to the front of a layer; returns how many moved there."""
        ffn = self.ffns[layer]
        assert ffn.order is not None
        mask = mask.to(ffn.order.device)
        count = int(mask.sum())
        front = ffn.by_row(mask)
        leaving = (~front[:count]).nonzero().flatten()
        entering = front[count:].nonzero().flatten() + count
        self._exchange(layer, leaving, entering)
        if count != self.kept[layer]:
            self.kept[layer] = count
            for slot in self._slots:
                if slot.layer == layer:
                    slot.cut(count)
        return len(entering)

    def slice(self) -> None:
        """The projections multiply the kept neurons."""
        for slot in self._slots:
            slot.narrow()

    def whole(self) -> None:
        """The projections multiply all neurons."""
        for slot in self._slots:
            slot.widen()

    @torch.no_grad()
    def restore(self) -> None:
        """Every neuron back to its place, bit for bit; also after an exception or an interrupt, which is raised again
        at the end if it comes while this runs."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._finish()
                self._finish_turn()
                self.whole()
                for layer, ffn in enumerate(self.ffns):
                    if ffn.order is not None:
                        for a, b in involutions(ffn.order.tolist()):
                            self._exchange(layer, torch.tensor(a), torch.tensor(b))
                for layer in list(self._turned):
                    self._transpose(layer, False)
                for ffn in self.ffns:
                    ffn.order = None
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _exchange(self, layer: int, a: Tensor, b: Tensor) -> None:
        """Swap the neurons at rows a with those at rows b; no row occurs twice."""
        self._finish()
        if not len(a):
            return
        ffn = self.ffns[layer]
        assert ffn.order is not None
        device = ffn.order.device
        read, write = torch.cat([b, a]).to(device), torch.cat([a, b]).to(device)
        order = ffn.order.index_copy(0, write, ffn.order[read])
        steps = [step for bank in self._banks[layer] for step in _steps(bank, a.to(device), b.to(device))]
        self._swap = _Swap(layer, steps, order)
        self._finish()

    def _finish(self) -> None:
        """Carry out the swap under way, from wherever it stands."""
        swap = self._swap
        if swap is None:
            return
        while swap.at[0] < len(swap.steps):
            done, values = swap.at
            view, dim, read, write = swap.steps[done]
            if values is None:
                values = _read(view, dim, read)
                swap.at = (done, values)
            view.index_copy_(dim, write, values)
            swap.at = (done + 1, None)
        self.ffns[swap.layer].order = swap.after
        self._swap = None

    def _transpose(self, layer: int, turned: bool) -> None:
        """Store a layer's down by neurons, or again as it was: in the same memory."""
        weight: Any = self.ffns[layer].down.weight
        values = weight.detach().t() if turned else weight.detach()
        self._turn = (layer, values.clone(memory_format=torch.contiguous_format), turned)
        self._finish_turn()

    def _finish_turn(self) -> None:
        if self._turn is None:
            return
        layer, values, turned = self._turn
        ffn = self.ffns[layer]
        weight: Any = ffn.down.weight
        memory = weight.detach().as_strided((weight.numel(),), (1,))
        memory.copy_(values.flatten())
        weight.data = memory.view(ffn.size, ffn.width).t() if turned else memory.view(ffn.width, ffn.size)
        self._turned = [i for i in self._turned if i != layer] + [layer] * turned
        self._turn = None


def _steps(bank: _Bank, a: Tensor, b: Tensor) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    """A swap in pieces, so that what is held beside the weights stays small."""
    if bank.dim == 0:
        pairs = zip(a.split(PAIRS), b.split(PAIRS), strict=True)
        return [(bank.tensor, 0, torch.cat([y, x]), torch.cat([x, y])) for x, y in pairs]
    read, write = torch.cat([b, a]), torch.cat([a, b])
    return [(rows, 1, read, write) for rows in bank.tensor.split(COLUMN_ROWS)]


def _read(view: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim == 1:  # of columns, the fastest that torch has on a CPU
        return view.gather(1, index.expand(len(view), -1))
    return view.index_select(0, index)


def involutions(order: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Two rounds of swaps, each of disjoint pairs (rows a with rows b), that sort `order`, a permutation of 0 .. n-1.

    Every cycle of a permutation is the product of two reflections.
    """
    rounds: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
    seen = [False] * len(order)
    for start in range(len(order)):
        cycle = []
        i = start
        while not seen[i]:
            seen[i] = True
            cycle.append(i)
            i = order[i]
        n = len(cycle)
        # Row cycle[k] holds neuron cycle[k + 1]. k -> -k, then k -> 1 - k, send row k's content to row k + 1.
        for (a, b), turn in zip(rounds, (0, 1), strict=True):
            for k in range(n):
                other = (turn - k) % n
                if k < other:
                    a.append(cycle[k])
                    b.append(cycle[other])
    return rounds


# -- where neurons are ---------------------------------------------------------------------------------------


def _banks(ffn: FFN, turned: bool) -> list[_Bank]:
    banks = []
    projections: list[Any] = [ffn.gate, ffn.up]
    down: Any = ffn.down
    for module in projections:
        if module is None:
            continue
        dim, halves = int(is_conv1d(module)), 2 if ffn.fused else 1
        banks += [_Bank(part, dim) for part in module.weight.detach().chunk(halves, dim)]
        if getattr(module, "bias", None) is not None:
            banks += [_Bank(part, 0) for part in module.bias.detach().chunk(halves)]
    if turned:  # as its memory will be
        return [*banks, _Bank(down.weight.detach().as_strided((ffn.size, ffn.width), (ffn.width, 1)), 0)]
    return [*banks, _Bank(down.weight.detach(), int(not is_conv1d(down)))]


def _slots(ffn: FFN) -> list[_Slot | _FusedSlot]:
    if ffn.fused:
        return [_FusedSlot(ffn.layer, ffn.up, ffn.size), *_slots_of(ffn.layer, ffn.down, into=True)]
    made = [_slots_of(ffn.layer, module, into=False) for module in (ffn.gate, ffn.up) if module is not None]
    return [slot for slots in (*made, _slots_of(ffn.layer, ffn.down, into=True)) for slot in slots]


def _slots_of(layer: int, module: Any, into: bool) -> list[_Slot]:
    """The weight, whose neurons are inputs (`into`) or outputs, and in the latter case the bias."""
    weight = _Slot(layer, module, "weight", int(is_conv1d(module) != into), module.weight)
    if into:
        return [weight]
    weight.features = "nf" if is_conv1d(module) else None
    has_bias = getattr(module, "bias", None) is not None
    return [weight, _Slot(layer, module, "bias", 0, module.bias)] if has_bias else [weight]


@dataclass
class _Slot:
    """A parameter of a projection that is there whole, or as a view of its first neurons."""

    layer: int
    module: Any
    name: str
    dim: int
    all: nn.Parameter
    features: str | None = None  # where the module keeps its outputs' number and uses it (Conv1D)
    part: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        self.part = self.all

    def cut(self, count: int) -> None:
        self.part = nn.Parameter(self.all.detach().narrow(self.dim, 0, count), requires_grad=False)

    def narrow(self) -> None:
        self._put(self.part)

    def widen(self) -> None:
        self._put(self.all)

    def _put(self, parameter: nn.Parameter) -> None:
        # Not by attribute: a module's __setattr__ would take longer than all the rest.
        self.module._parameters[self.name] = parameter
        if self.features is not None:
            setattr(self.module, self.features, parameter.shape[self.dim])


class _FusedSlot:
    """A projection that holds gate above up: the kept rows of both are not one view, so it multiplies two."""

    def __init__(self, layer: int, module: Any, size: int) -> None:
        self.layer, self.module, self.size = layer, module, size
        self.before = module.__dict__.get("forward")
        self.cut(size)

    def cut(self, count: int) -> None:
        weight, bias = self.module.weight.detach(), self.module.bias
        gate, up = (half[:count] for half in weight.split(self.size))
        gate_bias, up_bias = (None, None) if bias is None else (half[:count] for half in bias.detach().split(self.size))

        def forward(x: Tensor) -> Tensor:
            return torch.cat([linear(x, gate, gate_bias), linear(x, up, up_bias)], dim=-1)

        self.forward = forward

    def narrow(self) -> None:
        self.module.__dict__["forward"] = self.forward

    def widen(self) -> None:
        if self.before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.before


# -- where it cannot be done ---------------------------------------------------------------------------------


def quantised(ffns: Sequence[FFN]) -> str | None:
    """Why these projections have no plain weights whose rows could change places, or None."""
    for ffn in ffns:
        for module in (ffn.gate, ffn.up, ffn.down):
            weight = getattr(module, "weight", None)
            if module is not None and not (
                isinstance(weight, nn.Parameter)
                and weight.dim() == 2
                and weight.is_floating_point()
                and weight.element_size() > 1
                and not weight.is_meta
                and (type(module) is nn.Linear or is_conv1d(module))
            ):
                return f"the weights of {type(module).__name__} (layer {ffn.layer}) are quantised, wrapped or elsewhere"
    return None


def shared(ffns: Sequence[FFN], model: nn.Module) -> str | None:
    """Which FFN weights lie in memory that another module uses too, or None."""
    mine = {id(m.weight) for f in ffns for m in (f.gate, f.up, f.down) if m is not None}
    spans = []
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.numel() and not tensor.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.element_size(), name, id(tensor) in mine))
    reach, last_name, last_ours = 0, "", False  # of the spans so far, the one that ends last
    for start, end, name, ours in sorted(spans):
        if start < reach and (ours or last_ours):
            return f"the weights {last_name} and {name} share memory, so their neurons cannot be reordered apart"
        if end > reach:
            reach, last_name, last_ours = end, name, ours
    return None
