"""Parts of the slot `routing` at work on a model: routers that choose fewer experts, or among fewer of them.

A router is the model's own code that chooses experts. In every model type it takes the best of one score per expert by
`topk`, mostly after a softmax. While a layer runs, these two calls get the part's arguments; weights, groups and biases
stay the type's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dart_eval.layers.experts import Routed
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.experts.routings import Fewer, Routing, chosen
from dart_eval.util.errors import UserError

CHOOSE = (torch.topk, Tensor.topk)
NORMALISE = (torch.softmax, Tensor.softmax, nn.functional.softmax)


class Order(TorchFunctionMode):
    """A change to the router of one layer.

    Args:
        routed: the experts.
        count: experts of a token.
        own: whether the router is asked for that many; else its own choice is cut.
        available: [E] bool, the experts to choose among; None: all.
    """

    def __init__(self, routed: Routed, count: int, own: bool, available: Tensor | None) -> None:
        super().__init__()
        self.routed, self.count, self.own, self.available = routed, count, own, available
        self.running = self.asked = False  # whether the layer runs, and a choice among all its experts was seen

    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = dict(kwargs or {})
        if args and (func in CHOOSE or func in NORMALISE):
            first, rest = args[0], list(args[1:])
            over = tuple(first.shape[1:])  # of each token
            if self.available is not None and 0 < len(over) <= 2 and math.prod(over) == self.routed.all:  # in groups?
                first = first.masked_fill(~self.available.to(first.device).view(over), -torch.inf)
            if func in CHOOSE and over == (self.routed.all,):
                self.asked = True
                count = self.count if self.own else self.routed.count
                if rest and rest[0] == self.routed.count:
                    rest[0] = count
                elif kwargs.get("k") == self.routed.count:
                    kwargs["k"] = count
            args = (first, *rest)
        return func(*args, **kwargs)

    def begin(self) -> None:
        """Change the router while the layer runs."""
        self.end()
        self.routed.settle = self.settle
        self.running, self.asked = True, False
        self.__enter__()

    def end(self) -> None:
        """Restore the router, also if the layer never began or was left by an exception."""
        running, self.running = self.running, False
        if running:
            self.__exit__(None, None, None)
        self.routed.settle = None

    def settle(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of N tokens and their weights, [N, count of the model], padded with -1 and 0.

        Args:
            index, weights: [N, k], from the router.

        Raises:
            UserError: the router did not choose as it was asked to.
        """
        routed = self.routed
        if self.own and (not self.asked or index.shape[1] != self.count):
            raise UserError(
                f"the router of {routed.title} chooses experts in a way that is not understood", "take another method"
            )
        if not self.own and self.count < index.shape[1]:
            weights, best = weights.topk(self.count, dim=1)
            index = index.gather(1, best)
        if self.available is not None:  # a router whose groups have too few experts takes unavailable ones
            gone = ~self.available.to(index.device)[index]
            index, weights = index.masked_fill(gone, -1), weights.masked_fill(gone, 0)
        missing = (0, routed.count - index.shape[1])
        return nn.functional.pad(index, missing, value=-1), nn.functional.pad(weights, missing)


class Ordered:
    """Changes to the experts of layers, before any prompt.

    Args:
        orders: layer -> the change to its experts while a token is decoded, between `begin` and `end`.

    Attributes:
        swapped: None, as no weights change (see `attached.AttachedInputs`).
    """

    swapped = None
    replaces = False

    def __init__(self, ffns: Sequence[FFN], orders: Mapping[int, Any]) -> None:
        self.ffns, self.orders = ffns, orders

    def nbytes(self) -> int:
        """Return the bytes beside the model: a byte per expert, though a bit would do."""
        return sum(order.available.numel() for order in self.orders.values() if order.available is not None)

    def watch(self, add: Callable[[Any], None], forward: object) -> None:
        """Install the hooks that change experts while tokens are decoded.

        Args:
            add: called with the handle of each hook.
            forward: the current forward (`hooks.Forward`).
        """
        for ffn in self.ffns:
            order = self.orders.get(ffn.layer)
            if order is not None:
                add(ffn.holder.register_forward_pre_hook(_beginning(order, forward)))
                add(ffn.holder.register_forward_hook(_ending(order), always_call=True))
                add(SimpleNamespace(remove=order.end))  # an interrupt may have left the layer half run


def rerouted(part: Routing, sparsity: float, ffns: Sequence[FFN], calibration: Calibration | None) -> Ordered:
    """Return a part attached to a model's routers."""
    own = not isinstance(part, Fewer) or part.weights == "own"
    available: list[Tensor | None] = [None] * len(ffns)
    if part.calibrates:
        assert calibration is not None
        available = [_best(part, f, s) for f, s in zip(ffns, saliency(ffns, calibration), strict=True)]
    orders = {
        f.layer: Order(routed, count, own, some)
        for f, count, some in zip(ffns, part.counts(sparsity, ffns), available, strict=True)
        if (routed := chosen(f))
    }
    return Ordered(ffns, orders)


def _beginning(order: Any, forward: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: object) -> None:
        if forward.phase == "decode" and forward.state is not None:
            order.begin()

    return torch.compiler.disable(hook)


def _ending(order: Any) -> Callable[..., None]:
    return torch.compiler.disable(lambda *_: order.end())


def _best(part: Routing, ffn: FFN, saliency: Tensor) -> Tensor | None:
    """Return [E] bool, the experts of a layer that stay available; ties go to the lower index."""
    routed = chosen(ffn)
    if routed is None:
        return None
    order = saliency.sort(descending=True, stable=True).indices
    available = torch.zeros(routed.all, dtype=torch.bool)
    available[order[: part.experts_left(routed.all)]] = True
    return available


@torch.no_grad()
def saliency(ffns: Sequence[FFN], calibration: Calibration) -> list[Tensor]:
    """Return REAP's saliency of the experts of each layer on the calibration text, [E] fp32; [0] for other FFNs.

    It is the mean norm of an expert's output times the router's weight, over the tokens that have the expert.
    """

    def measure() -> list[Tensor]:
        sums = [torch.zeros(f.routed.all if f.routed else 0) for f in ffns]
        tokens = [torch.zeros_like(s) for s in sums]

        def see(layer: int, _x: Tensor, h: Tensor) -> None:
            routed = ffns[layer].routed
            if routed is not None:
                index, norms = routed.index[-len(h) :].cpu(), routed.written(h).cpu()
                some = index >= 0  # LongCat: a token may have fewer
                sums[layer].index_add_(0, index[some], norms[some])
                tokens[layer].index_add_(0, index[some], torch.ones(int(some.sum())))

        calibration.visit(see)
        return [s / n.clamp_min(1) for s, n in zip(sums, tokens, strict=True)]

    return calibration.once("saliency of experts", measure)
