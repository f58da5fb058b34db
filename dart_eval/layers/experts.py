"""Mixtures of experts: the routed experts of a layer as one FFN, in which a token has the neurons of its experts.

transformers hands all calls of experts to a function that can be registered (`ALL_EXPERTS_FUNCTIONS`). Ours computes
the same in two steps that look like modules: up, from x, and down, from h. So hooks on the h of an FFN work here, too.
The router's weight is a part of h, so that neurons of different experts can be compared.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dart_eval.layers import llama4
from dart_eval.layers.projection import Step
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "dart_eval"  # of the function, in `config._experts_implementation`
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k", "top_k")


class Routed:
    """The experts of one layer under the routing of the current forward.

    Attributes:
        up, down: the two steps, as modules that can be hooked.
        count: experts of a token.
        inner: neurons of an expert.
        size: neurons of a token's experts.
        width: D.
        silent: leave out biases of down.
        index: [N, count], experts of N tokens.
        weights: [N, count], the router's weight of each.
        inward: [N, count], factor on x for each expert (of Llama 4, in place of the weights), or None.
    """

    def __init__(self, experts: Any) -> None:
        # A weak reference, as the module is the key in `_KNOWN`.
        self._experts = (lambda: experts) if isinstance(experts, llama4.Llama4Experts) else weakref.ref(experts)
        self.count = _routed(experts.config)
        rows, columns = experts.down_proj.shape[1:]
        self.inner, self.width = (rows, columns) if experts.is_transposed else (columns, rows)
        self.size = self.count * self.inner
        self.up, self.down = _Up(self, self.width, self.size), _Down(self, self.size, self.width)
        self.index: Tensor = torch.empty(0, self.count, dtype=torch.long)
        self.weights: Tensor = torch.empty(0, self.count)
        self.inward: Tensor | None = None
        self.projected: Tensor | None = None
        self.silent = False

    @property
    def experts(self) -> Any:
        """transformers' module."""
        return self._experts()

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[N, D] -> [N, D], as stock experts."""
        self.index, self.weights = index, weights
        if isinstance(self.experts, llama4.Llama4Experts):
            self.inward, self.weights = self.weights, torch.ones_like(self.weights)
        self.up(x)
        projected, self.projected = self.projected, None
        assert projected is not None
        h = self.hidden(projected) * self.weights[..., None].to(projected.dtype)
        return self.down(h.reshape(len(x), -1))

    def hidden(self, projected: Tensor) -> Tensor:
        """Return [N, count, I], h without the router's weight. projected: the experts' first product."""
        return self.experts._apply_gate(projected) if self.experts.has_gate else self.experts.act_fn(projected)

    def act(self, gate: Tensor) -> Tensor:
        """Return the gate's factor in h, elementwise: h for up = 1. For a plain FFN, the activation."""
        if self.experts.has_gate:
            return self.gated(gate, torch.ones_like(gate))
        h = self.experts.act_fn(gate).reshape(-1, self.count, self.inner)
        return (h * self.weights[-len(h) :, :, None].to(h.dtype)).reshape(gate.shape)

    def rest(self, up: Tensor) -> Tensor:
        """Return up's factor in h, elementwise: h for gate = 1, divided by h for both = 1 (gpt-oss adds 1 to up)."""
        one = torch.ones_like(up)
        return self.gated(one, up) / self.gated(one, one)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return h from gate x and up x, [..., I] each, without the router's weight."""
        pair = torch.cat([gate, up], -1) if self.experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return self.experts._apply_gate(pair)

    def halves(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Split the first product into gate x and up x."""
        if self.experts.is_concatenated:
            gate, up = projected.chunk(2, -1)
            return gate, up
        return projected[..., ::2], projected[..., 1::2]

    # -- masks of all experts' neurons -----------------------------------------------------------------------------

    @property
    def all(self) -> int:
        """Number of experts."""
        return len(self.experts.down_proj)

    @property
    def pool(self) -> int:
        """Neurons of all experts together."""
        return self.inner * self.all

    def _index(self, batch: int, tokens: int | None = None) -> Tensor:
        """Return [B, T, count], the experts of the last `tokens` tokens of each sequence; None: of all."""
        count = len(self.index) if tokens is None else batch * tokens
        return self.index[len(self.index) - count :].view(batch, -1, self.count)

    def gather(self, mask: Tensor, batch: int) -> Tensor:
        """Select the neurons of each token's experts in the current forward: [B or 1, pool] -> [B, T, F]."""
        mask, index = mask.expand(batch, -1), self._index(batch)
        own = mask.view(batch, -1, self.inner).gather(1, index.reshape(batch, -1, 1).expand(-1, -1, self.inner))
        return own.view(batch, -1, self.size)

    def spread(self, h: Tensor, some: slice, tokens: int | None) -> Tensor:
        """See `ffn.FFN.spread`."""
        batch, length = h.shape[:2]
        index = self._index(batch, length if tokens is None else tokens)
        index = index[:, some, :, None].expand(-1, -1, -1, self.inner)
        out = h.new_zeros(batch, length, self.pool // self.inner, self.inner)
        return out.scatter_add_(2, index, h.view(batch, length, self.count, self.inner)).flatten(2)

    def mask_of(self, take: Callable[[Tensor, Tensor], Tensor], scores: Tensor, keep: Tensor) -> Tensor:
        """See `ffn.FFN.mask_of`. An expert that no token has had is ranked by the norms of its columns of down."""
        each = scores.view(len(scores), -1, self.inner)
        unseen = (each == 0).all(-1, keepdim=True)
        if bool(unseen.any()):
            norms = self.output_weight().float().norm(dim=0).view(1, -1, self.inner)
            each = torch.where(unseen, norms.to(each.device, each.dtype), each)
        counts = (keep // self.count).repeat_interleave(each.shape[1])
        return take(each.reshape(-1, self.inner), counts).view(scores.shape)

    # -- weights ---------------------------------------------------------------------------------------------------

    def input_weights(self) -> list[Tensor]:
        """Return gate and up (or up alone) of all experts, [pool, D] each: copies."""
        projected = self.experts.gate_up_proj if self.experts.has_gate else self.experts.up_proj
        projected = projected.mT if not self.experts.is_transposed else projected  # [E, D, rows]
        parts = self.halves(projected) if self.experts.has_gate else (projected,)
        return [part.transpose(1, 2).reshape(self.pool, self.width) for part in parts]

    def output_weight(self) -> Tensor:
        """Return down of all experts, [D, pool]: a copy."""
        down = self.experts.down_proj if self.experts.is_transposed else self.experts.down_proj.mT  # [E, I, D]
        return down.reshape(self.pool, self.width).T

    def stored_inputs(self, parts: Sequence[Tensor]) -> Tensor:
        """Convert the output of `input_weights` to the parameter's layout: a copy, [E, D, rows] or [E, rows, D]."""
        each = [part.view(self.all, self.inner, self.width).transpose(1, 2) for part in parts]
        if len(each) == 1 or self.experts.is_concatenated:
            projected = torch.cat(each, -1)
        else:
            projected = torch.stack(each, -1).flatten(-2)
        return (projected if self.experts.is_transposed else projected.mT).contiguous()

    # -- the two steps ---------------------------------------------------------------------------------------------

    def each(self, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert that some token has: expert, the tokens, and its places among their experts."""
        for expert in index.unique().tolist():
            tokens, places = (index == expert).nonzero(as_tuple=True)
            yield expert, tokens, places

    def times(self, x: Tensor, name: str, expert: int) -> Tensor:
        """Return the product with one of an expert's matrices."""
        weight = getattr(self.experts, name)[expert]
        return x @ weight if self.experts.is_transposed else nn.functional.linear(x, weight)

    def bias(self, name: str, expert: int) -> Tensor | None:
        """Return the bias of an expert's matrix, or None."""
        return getattr(self.experts, f"{name}_bias")[expert] if self.experts.has_bias else None


class _Step(Step):
    """One of the two steps: a module with the experts' parameters, so that it can be hooked."""

    def __init__(self, routed: Routed, in_features: int, out_features: int) -> None:
        super().__init__()
        self.routed, self.in_features, self.out_features = routed, in_features, out_features

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.routed.experts.parameters(recurse)


class _Up(_Step):
    """[N, D] of the last N tokens -> gate x and up x of each one's experts, [N, 2 F] (of a plain FFN up x, [N, F])."""

    @property
    def held(self) -> nn.Parameter:
        return self.routed.experts.gate_up_proj if self.routed.experts.has_gate else self.routed.experts.up_proj

    def matrix(self) -> Tensor:
        return torch.cat(self.routed.input_weights())

    def stored(self, matrix: Tensor) -> Tensor:
        return self.routed.stored_inputs(matrix.chunk(2 if self.routed.experts.has_gate else 1))

    def forward(self, x: Tensor) -> Tensor:
        routed, shape = self.routed, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        name = "gate_up_proj" if routed.experts.has_gate else "up_proj"
        projected = x.new_zeros(len(x), routed.count, routed.inner * (2 if routed.experts.has_gate else 1))
        for expert, tokens, places in routed.each(routed.index[-len(x) :]):
            out = routed.times(x[tokens], name, expert)
            bias = routed.bias(name, expert)
            projected[tokens, places] = out if bias is None else out + bias
        if routed.inward is not None:
            projected = projected * routed.inward[-len(x) :, :, None].to(projected.dtype)
        routed.projected = projected
        if not routed.experts.has_gate:
            return projected.reshape(*shape, -1)
        gate, up = routed.halves(projected)
        rest = routed.rest(up) * routed.weights[-len(x) :, :, None].to(up.dtype)  # the router's weight is a part of h
        return torch.cat([gate.reshape(*shape, -1), rest.reshape(*shape, -1)], -1)


class _Down(_Step):
    """h of each token's experts [N, F] -> their output [N, D]."""

    @property
    def held(self) -> nn.Parameter:
        return self.routed.experts.down_proj

    def matrix(self) -> Tensor:
        down = self.routed.experts.down_proj
        return (down.mT if self.routed.experts.is_transposed else down).reshape(-1, self.routed.inner)

    def stored(self, matrix: Tensor) -> Tensor:
        each = matrix.view(self.routed.all, self.routed.width, -1)
        return (each.mT if self.routed.experts.is_transposed else each).contiguous()

    def forward(self, h: Tensor) -> Tensor:
        routed, shape = self.routed, h.shape[:-1]
        h = h.reshape(-1, routed.count, routed.inner)
        out, weights = h.new_zeros(len(h), routed.width), routed.weights[-len(h) :]
        for expert, tokens, places in routed.each(routed.index[-len(h) :]):
            written = routed.times(h[tokens, places], "down_proj", expert)
            bias = routed.bias("down_proj", expert)
            if bias is not None and not routed.silent:
                written = written + bias * weights[tokens, places, None].to(bias.dtype)
            out.index_add_(0, tokens, written.to(out.dtype))
        return out.reshape(*shape, -1)


def _routed(config: PretrainedConfig) -> int:
    count = next((getattr(config, name) for name in ROUTED if isinstance(getattr(config, name, None), int)), None)
    if count is None:
        raise UserError(
            f"how many experts a token of {config.model_type} has is not known",
            "add the name of its setting to ROUTED in dart_eval/layers/experts.py",
        )
    return count


def routes(settings: Mapping[str, object]) -> bool:
    """Whether a model has routed experts, by the settings of its configuration and of nested ones."""
    inner = (value for value in settings.values() if isinstance(value, dict))
    return any(settings.get(name) for name in ROUTED) or any(map(routes, inner))


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Routed] = weakref.WeakKeyDictionary()


def is_routed(module: nn.Module) -> bool:
    """Whether a module is experts that transformers hands to a registered function, or a block of Llama 4."""
    interface = hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "down_proj")
    return interface or llama4.is_block(module)


def routed(experts: Any) -> Routed:
    """Return the experts of a layer as one FFN, made once.

    Raises:
        UserError: the module has a norm between an expert's output and the router's weight.
    """
    block = llama4.is_block(experts)
    if not block and experts.has_post_expert_norm:
        raise UserError(f"{type(experts).__name__} has a norm behind each expert", "such experts are not supported")
    if experts not in _KNOWN:
        _KNOWN[experts] = Routed(llama4.Llama4Experts(experts) if block else experts)
    return _KNOWN[experts]


def _forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return routed(experts)(hidden_states, top_k_index, top_k_weights)


def ours(experts: nn.Module) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """Return the function that computes a module of experts in our two steps, with its forward's arguments."""
    if llama4.is_block(experts):
        return functools.partial(llama4.run, experts, routed(experts))
    return functools.partial(_forward, experts)


def take_over(model: nn.Module) -> list[tuple[Any, object]]:
    """Let our function compute the model's experts. Return the argument of `give_back`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # takes a second

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    before = _hand_to(model, NAME)
    for module in model.modules():
        if llama4.is_block(module):
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = ours(module)
    return before


def _hand_to(model: nn.Module, name: str) -> list[tuple[object, object]]:
    """Let a function of transformers' table compute the experts. Return the former settings."""
    before = []
    configs: list[Any] = [m.config for m in model.modules() if is_routed(m) and not llama4.is_block(m)]
    for config in {id(c): c for c in configs}.values():
        before.append((config, config._experts_implementation_internal))
        config._experts_implementation_internal = name
    return before


def give_back(before: list[tuple[Any, Any]]) -> None:
    """Undo `take_over`."""
    for owner, was in before:
        if not isinstance(owner, nn.Module):
            owner._experts_implementation_internal = was
        elif was is None:
            owner.__dict__.pop("forward", None)
        else:
            owner.__dict__["forward"] = was


@contextmanager
def taken_over(model: nn.Module, as_written: bool = False) -> Iterator[None]:
    """Let our function compute the model's experts inside; `as_written`: the modules' own code, in any dtype."""
    before = _hand_to(model, "eager") if as_written else take_over(model)
    try:
        yield
    finally:
        give_back(before)
