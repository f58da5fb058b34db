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
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.families import get
from dart_eval.util.errors import UserError

NAME = "dart_eval"  # of the function, in `config._experts_implementation`
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k", "top_k")


class Llama4Experts:
    """The experts of a block of Llama 4 with transformers' interface: see `use_experts_implementation` there.

    transformers does not hand them to a function. The router's weight multiplies x, not an expert's output.
    """

    has_gate = is_concatenated = is_transposed = True
    has_bias = has_post_expert_norm = False

    def __init__(self, block: Any) -> None:
        self._experts = block.experts
        self.config = SimpleNamespace(num_experts_per_tok=int(block.top_k))

    def __getattr__(self, name: str) -> Any:
        """Return a part of the experts: `gate_up_proj` [E, D, 2 I], `down_proj` [E, I, D]."""
        return getattr(self._experts, name)

    def _apply_gate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, -1)
        return self._experts.act_fn(gate) * up


class Routed:
    """The experts of one layer under the routing of the current forward.

    Attributes:
        up, down: the two steps, as modules that can be hooked.
        count: experts of a token.
        inner: neurons of an expert.
        size: neurons of a token's experts.
        all: number of experts.
        pool: neurons of all experts together.
        width: D.
        silent: leave out biases of down.
        index: [N, count], experts of N tokens.
        weights: [N, count], the router's weight of each.
        inward: [N, count], factor on x for each expert (of Llama 4, in place of the weights), or None.
    """

    def __init__(self, experts: Any) -> None:
        # A weak reference, as the module is the key in `_KNOWN`.
        self._experts = (lambda: experts) if isinstance(experts, Llama4Experts) else weakref.ref(experts)
        counts = (getattr(experts.config, name, None) for name in ROUTED)
        self.count = next((count for count in counts if isinstance(count, int)), 0)
        if not self.count:
            raise UserError(
                f"how many experts a token of {experts.config.model_type} has is not known",
                "add the name of its setting to ROUTED in dart_eval/layers/experts.py",
            )
        rows, columns = experts.down_proj.shape[1:]
        self.inner, self.width = (rows, columns) if experts.is_transposed else (columns, rows)
        self.size, self.all = self.count * self.inner, len(experts.down_proj)
        self.pool = self.all * self.inner
        self.up = _Up(self, "gate_up_proj" if experts.has_gate else "up_proj", self.width, self.size)
        self.down = _Down(self, "down_proj", self.size, self.width)
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
        if isinstance(self.experts, Llama4Experts):
            self.inward, self.weights = self.weights, torch.ones_like(self.weights)
        self.up(x)
        projected, self.projected = self.projected, None
        assert projected is not None
        h = self.experts._apply_gate(projected) if self.experts.has_gate else self.experts.act_fn(projected)
        h = h * self.weights[..., None].to(projected.dtype)
        return self.down(h.reshape(len(x), -1))

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

    def _index(self, batch: int, tokens: int | None = None) -> Tensor:
        """Return [B, T, count], the experts of the last `tokens` tokens of each sequence; None: of all."""
        count = len(self.index) if tokens is None else batch * tokens
        return self.index[len(self.index) - count :].view(batch, -1, self.count)

    def gather(self, mask: Tensor, batch: int) -> Tensor:
        """Select the neurons of each token's experts in the current forward: [B or 1, pool] -> [B, T, F]."""
        mask, index = mask.expand(batch, -1), self._index(batch)
        rows = mask.view(batch, -1, self.inner).gather(1, index.reshape(batch, -1, 1).expand(-1, -1, self.inner))
        return rows.view(batch, -1, self.size)

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
        projected = self.up.parameter if self.experts.is_transposed else self.up.parameter.mT  # [E, D, rows]
        parts = self.halves(projected) if self.experts.has_gate else (projected,)
        return [part.transpose(1, 2).reshape(self.pool, self.width) for part in parts]

    def output_weight(self) -> Tensor:
        """Return down of all experts, [D, pool]: a copy."""
        down = self.experts.down_proj if self.experts.is_transposed else self.experts.down_proj.mT  # [E, I, D]
        return down.reshape(self.pool, self.width).T

    # -- the two steps ---------------------------------------------------------------------------------------------

    def each(self, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert that some token has: expert, the tokens, and its places among their experts."""
        for expert in index.unique().tolist():
            tokens, places = (index == expert).nonzero(as_tuple=True)
            yield expert, tokens, places

    def times(self, x: Tensor, name: str, expert: int, share: Tensor | float) -> Tensor:
        """Return the product with one of an expert's matrices, plus a share of its bias."""
        weight = getattr(self.experts, name)[expert]
        product = x @ weight if self.experts.is_transposed else nn.functional.linear(x, weight)
        return product + share * getattr(self.experts, f"{name}_bias")[expert] if self.experts.has_bias else product


class ExpertProjection(nn.Module):
    """One of the two steps: a module with the experts' parameters, so that it can be hooked.

    Attributes:
        routed: the experts.
        in_features, out_features: D and F, or F and D.
        name: of the parameter that it multiplies with.
    """

    def __init__(self, routed: Routed, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.routed, self.name, self.in_features, self.out_features = routed, name, in_features, out_features

    @property
    def parameter(self) -> nn.Parameter:
        """The matrices of all experts."""
        return getattr(self.routed.experts, self.name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.routed.experts.parameters(recurse)

    def matrix(self) -> Tensor:
        """Return the matrices of all experts as [out, in], their rows below each other; perhaps a copy."""
        raise NotImplementedError

    def stored(self, matrix: Tensor) -> Tensor:
        """Convert such a matrix to the parameter's layout: a copy."""
        raise NotImplementedError


class _Up(ExpertProjection):
    """[N, D] of the last N tokens -> gate x and up x of each one's experts, [N, 2 F] (of a plain FFN up x, [N, F])."""

    def matrix(self) -> Tensor:
        return torch.cat(self.routed.input_weights())

    def stored(self, matrix: Tensor) -> Tensor:
        routed, parts = self.routed, matrix.chunk(2 if self.routed.experts.has_gate else 1)
        each = [part.view(routed.all, routed.inner, routed.width).transpose(1, 2) for part in parts]
        apart = len(each) == 2 and not routed.experts.is_concatenated
        projected = torch.stack(each, -1).flatten(-2) if apart else torch.cat(each, -1)
        return (projected if routed.experts.is_transposed else projected.mT).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        routed, shape = self.routed, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        projected = x.new_zeros(len(x), routed.count, routed.inner * (2 if routed.experts.has_gate else 1))
        for expert, tokens, places in routed.each(routed.index[-len(x) :]):
            projected[tokens, places] = routed.times(x[tokens], self.name, expert, 1.0)
        if routed.inward is not None:
            projected = projected * routed.inward[-len(x) :, :, None].to(projected.dtype)
        routed.projected = projected
        if not routed.experts.has_gate:
            return projected.reshape(*shape, -1)
        gate, up = routed.halves(projected)
        rest = routed.rest(up) * routed.weights[-len(x) :, :, None].to(up.dtype)  # the router's weight is a part of h
        return torch.cat([gate.reshape(*shape, -1), rest.reshape(*shape, -1)], -1)


class _Down(ExpertProjection):
    """h of each token's experts [N, F] -> their output [N, D]."""

    def matrix(self) -> Tensor:
        down = self.parameter.mT if self.routed.experts.is_transposed else self.parameter
        return down.reshape(-1, self.routed.inner)

    def stored(self, matrix: Tensor) -> Tensor:
        each = matrix.view(self.routed.all, self.routed.width, -1)
        return (each.mT if self.routed.experts.is_transposed else each).contiguous()

    def forward(self, h: Tensor) -> Tensor:
        routed, shape = self.routed, h.shape[:-1]
        h = h.reshape(-1, routed.count, routed.inner)
        out = h.new_zeros(len(h), routed.width)
        weights = routed.weights[-len(h) :].to(h.dtype) * (not routed.silent)
        for expert, tokens, places in routed.each(routed.index[-len(h) :]):
            written = routed.times(h[tokens, places], self.name, expert, weights[tokens, places, None])
            out.index_add_(0, tokens, written.to(out.dtype))
        return out.reshape(*shape, -1)


def routes(settings: Mapping[str, object]) -> bool:
    """Whether a model has routed experts, by the settings of its configuration and of nested ones."""
    inner = (value for value in settings.values() if isinstance(value, dict))
    return any(settings.get(name) for name in ROUTED) or any(map(routes, inner))


def is_llama4(module: nn.Module) -> bool:
    """Whether this is a block of Llama 4 with experts of plain weights."""
    matrices = get(module, "experts.gate_up_proj"), get(module, "experts.down_proj")
    return all(isinstance(m, nn.Parameter) and m.dim() == 3 for m in matrices) and all(
        get(module, name) is not None for name in ("router", "shared_expert", "experts.act_fn", "top_k")
    )


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Routed] = weakref.WeakKeyDictionary()


def is_routed(module: nn.Module) -> bool:
    """Whether a module is experts that transformers hands to a registered function, or a block of Llama 4."""
    interface = hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "down_proj")
    return interface or is_llama4(module)


def routed(experts: Any) -> Routed:
    """Return the experts of a layer as one FFN, made once.

    Raises:
        UserError: the module has a norm between an expert's output and the router's weight.
    """
    block = is_llama4(experts)
    if not block and experts.has_post_expert_norm:
        raise UserError(f"{type(experts).__name__} has a norm behind each expert", "such experts are not supported")
    if experts not in _KNOWN:
        _KNOWN[experts] = Routed(Llama4Experts(experts) if block else experts)
    return _KNOWN[experts]


def _forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return routed(experts)(hidden_states, top_k_index, top_k_weights)


def _run_llama4(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the forward of a block of Llama 4: experts take x times the router's weight; all others x times 0."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, index = scores.topk(block.top_k)
    return block.shared_expert(x) + routed(block)(x, index, weights), logits


def ours(experts: nn.Module) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """Return the function that computes a module of experts in our two steps, with its forward's arguments."""
    return functools.partial(_run_llama4 if is_llama4(experts) else _forward, experts)


def take_over(model: nn.Module, as_written: bool = False) -> list[tuple[Any, str, object]]:
    """Let our function compute the model's experts; `as_written`: the modules' own code, in any dtype.

    Returns:
        The argument of `give_back`.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # takes a second

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    before: list[tuple[Any, str, object]] = []
    changed: tuple[Any, str, object]
    for module in filter(is_routed, model.modules()):
        if is_llama4(module):
            changed = module, "forward", module.forward if as_written else ours(module)
        else:
            changed = module.config, "_experts_implementation_internal", "eager" if as_written else NAME
        owner, name, value = changed
        before.append((owner, name, vars(owner).get(name, ...)))
        vars(owner)[name] = value
    return before


def give_back(before: Sequence[tuple[Any, str, object]]) -> None:
    """Undo `take_over`."""
    for owner, name, value in reversed(before):
        vars(owner).pop(name)
        vars(owner).update({} if value is ... else {name: value})


@contextmanager
def taken_over(model: nn.Module, as_written: bool = False) -> Iterator[None]:
    """Let our function compute the model's experts inside. as_written: see `take_over`."""
    before = take_over(model, as_written)
    try:
        yield
    finally:
        give_back(before)


# -- outside a forward: of earlier tokens ------------------------------------------------------------------------------


def routing(routed: Routed, batch: int) -> Tensor:
    """Return [B, T, 2 count] fp32, the experts of each token of the current forward, and their weights."""
    counts = routed.weights if routed.inward is None else routed.inward
    return torch.cat([routed.index.float(), counts.float()], -1).view(batch, -1, 2 * routed.count)


@contextmanager
def under(routed: Routed, routing: Tensor) -> Iterator[None]:
    """Give tokens this routing inside: [..., 2 count]."""
    before = routed.index, routed.weights, routed.inward
    index, counts = routing.reshape(-1, 2 * routed.count).chunk(2, -1)
    routed.index, routed.weights = index.long(), counts
    if routed.inward is not None:
        routed.weights, routed.inward = torch.ones_like(counts), counts
    try:
        yield
    finally:
        routed.index, routed.weights, routed.inward = before
