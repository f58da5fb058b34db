"""Parts of the slot `routing` at work on a model: routers that choose fewer experts, or among fewer of them.

A router is the model's own code that chooses experts. In every model type it takes the best of one score per expert by
`topk`, mostly after a softmax. While a layer runs, these two calls get the part's arguments; weights, groups and biases
stay the type's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


class Choosing(TorchFunctionMode):
    """Changes the router of one layer while it is entered.

    Args:
        routed: the experts.
        count: experts of a token; the model's own count leaves the router as it is.
        available: [E] bool, the experts to choose among; None: all.
    """

    def __init__(self, routed: Routed, count: int, available: Tensor | None) -> None:
        super().__init__()
        self.routed, self.count, self.available = routed, count, available
        self.asked = False  # whether a choice among all experts was seen

    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = dict(kwargs or {})
        if args and (func in CHOOSE or func in NORMALISE):
            first, rest = args[0], list(args[1:])
            over = tuple(first.shape[1:])  # of each token
            if self.available is not None and 0 < len(over) <= 2 and math.prod(over) == self.routed.all:  # in groups?
                first = first.masked_fill(~self.available.to(first.device).view(over), -torch.inf)
            if func in CHOOSE and over == (self.routed.all,):
                self.asked = True
                if rest and rest[0] == self.routed.count:
                    rest[0] = self.count
                elif kwargs.get("k") == self.routed.count:
                    kwargs["k"] = self.count
            args = (first, *rest)
        return func(*args, **kwargs)


class Order:
    """A change to the router of one layer.

    Args:
        routed: the experts.
        count: experts of a token.
        own: whether the router is asked for that many; else its own choice is cut.
        available: [E] bool, the experts to choose among; None: all.
    """

    def __init__(self, routed: Routed, count: int, own: bool, available: Tensor | None) -> None:
        self.routed, self.count, self.own, self.available = routed, count, own, available
        self._mode: Choosing | None = None

    def begin(self) -> None:
        """Change the router while the layer runs."""
        self.end()
        self.routed.settle = self.settle
        self._mode = Choosing(self.routed, self.count if self.own else self.routed.count, self.available)
        self._mode.__enter__()

    def end(self) -> None:
        """Restore the router, also if the layer never began or was left by an exception."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
        self.routed.settle = None

    def settle(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of N tokens and their weights, [N, count of the model], padded with -1 and 0.

        Args:
            index, weights: [N, k], from the router.

        Raises:
            UserError: the router did not choose as it was asked to.
        """
        routed, mode = self.routed, self._mode
        if self.own and (mode is None or not mode.asked or index.shape[1] != self.count):
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
                add(_Ending(order))


class Rerouted(Ordered):
    """A part attached to a model's routers.

    Args:
        counts: [L] experts of a token in each layer, 0 in layers without experts.
    """

    def __init__(
        self, part: Routing, ffns: Sequence[FFN], counts: Sequence[int], calibration: Calibration | None
    ) -> None:
        own = not isinstance(part, Fewer) or part.weights == "own"
        available: list[Tensor | None] = [None] * len(ffns)
        if part.calibrates and calibration is not None:
            available = [_best(part, f, s) for f, s in zip(ffns, saliency(ffns, calibration), strict=True)]
        orders = {
            f.layer: Order(routed, count, own, some)
            for f, count, some in zip(ffns, counts, available, strict=True)
            if (routed := chosen(f))
        }
        super().__init__(ffns, orders)


def _beginning(order: Any, forward: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: object) -> None:
        if forward.phase == "decode" and forward.state is not None:
            order.begin()

    return torch.compiler.disable(hook)


def _ending(order: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: object, _output: object) -> None:
        order.end()

    return torch.compiler.disable(hook)


class _Ending:
    """Ends an order when the hooks are removed, since an interrupt may have left a layer half run."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def remove(self) -> None:
        self.order.end()


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
