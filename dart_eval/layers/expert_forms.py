"""Modules of experts that transformers does not hand to a function: where their weights are, and how they are called.

A form lists the paths of the matrices, and repeats the module's code around our two steps (`experts.Routed`). The trial
forward compares each form with the module's own answer (`verify`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.families import get

Steps = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [N, D], experts [N, count], their weights -> [N, D]
Output = Tensor | tuple[Tensor, Tensor]  # of a module, perhaps with the router's logits


@dataclass(frozen=True)
class Form:
    """The layout of a kind of module with E experts of I neurons.

    Attributes:
        inputs: paths of gate and up together, [E, 2 I, D], or of each, [E, I, D].
        down: path of [E, D, I].
        act: path of the activation.
        count: path of the number of experts of a token.
        marks: paths of further attributes that identify the module.
        run: the module's forward: (module, our two steps, its arguments) -> its output.
        transposed: down is stored as [E, I, D], and gate and up together as [E, D, 2 I].
        weighs_input: the router's weight multiplies x, not the expert's output.
        experts: path of E, if the first two dimensions of all matrices are one.
    """

    inputs: tuple[str, ...]
    down: str
    act: str
    count: str
    marks: tuple[str, ...]
    run: Callable[..., Output]
    transposed: bool = False
    weighs_input: bool = False
    experts: str | None = None


class View:
    """Experts of another form with transformers' interface: see `use_experts_implementation` there."""

    has_gate = is_concatenated = True
    has_bias = has_post_expert_norm = False

    def __init__(self, module: nn.Module, form: Form) -> None:
        self._module, self.form, self.title = weakref.ref(module), form, type(module).__name__
        self.is_transposed, self.weighs_input = form.transposed and len(form.inputs) == 1, form.weighs_input
        self.config = SimpleNamespace(num_experts_per_tok=int(get(module, form.count)))

    def _get(self, path: str) -> Any:
        return get(self._module(), path)

    @property
    def down_proj(self) -> Tensor:
        """[E, D, I], or [E, I, D] if `is_transposed`: the parameter itself, in another shape."""
        down: Tensor = self._get(self.form.down)
        if self.form.experts is not None:
            down = down.view(self._experts(), -1, down.shape[-1])
        return down.mT if self.form.transposed and not self.is_transposed else down

    @property
    def gate_up_proj(self) -> Tensor:
        """[E, 2 I, D], or [E, D, 2 I] if `is_transposed`: a copy if gate and up are separate."""
        parts: list[Tensor] = [self._get(path) for path in self.form.inputs]
        if len(parts) == 1:
            more = len(parts[0]) > self._experts()  # idle experts (LongCat)
            return parts[0][: self._experts()] if more else parts[0]
        return torch.cat([p.view(self._experts(), -1, p.shape[-1]) for p in parts], 1)

    def _experts(self) -> int:
        down: Tensor = self._get(self.form.down)
        return len(down) if self.form.experts is None else int(self._get(self.form.experts))

    def _apply_gate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, -1)
        act = self._get(self.form.act)
        return act(gate) * up

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the module."""
        module: Any = self._module()
        return module.parameters(recurse)


def _scaling_x(block: Any, steps: Steps, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4: experts take x times the router's weight; all others x times 0, which gives 0."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, index = scores.topk(block.top_k)
    return block.shared_expert(x) + steps(x, index, weights), logits


def _of_all(_experts: object, steps: Steps, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """Inkling's shared experts: every token has all of them, by its own weights."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    weights = gammas.reshape(len(x), -1)
    index = torch.arange(weights.shape[1], device=x.device).expand_as(weights)
    return steps(x, index, weights).view(hidden_states.shape)


def _with_idle(block: Any, steps: Any, hidden_states: Tensor) -> Tensor:
    """LongCat: a token may have idle experts, which return it unchanged and read nothing."""
    _, weights, index = block.router(hidden_states)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    idle = index >= len(block.experts.down_proj)
    out: Tensor = steps(x, index.masked_fill(idle, -1), weights.masked_fill(idle, 0))
    if not steps.silent:
        out = out + (x * (weights * idle).sum(-1, keepdim=True)).to(out.dtype)
    return out.view(hidden_states.shape)


def _norm_of_weights(block: Any, steps: Steps, hidden_states: Tensor) -> Tensor:
    """DBRX."""
    weights, index = block.route_tokens_to_experts(block.router(hidden_states))
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    return steps(x, index, weights).view(hidden_states.shape)


def _sorted(block: Any, steps: Steps, layer_input: Tensor) -> Tensor:
    """JetMoE: its router sorts tokens by expert, and the experts' output gets a bias."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    best, index = block.router(x)[-1].topk(block.router.top_k, dim=1)
    out = steps(x, index, best.softmax(1).type_as(x)) + block.bias
    return out.view(layer_input.shape)


FORMS = (
    Form(  # Llama 4
        ("experts.gate_up_proj",), "experts.down_proj", "experts.act_fn", "top_k", ("router", "shared_expert"),
        _scaling_x, transposed=True, weighs_input=True,
    ),
    Form(("gate_proj", "up_proj"), "down_proj", "act_fn", "n_shared_experts", (), _of_all),  # Inkling
    Form(  # LongCat
        ("experts.gate_up_proj",), "experts.down_proj", "experts.act_fn", "router.top_k", ("experts.identity_expert",),
        _with_idle,
    ),
    Form(  # DBRX
        ("experts.mlp.w1", "experts.mlp.v1"), "experts.mlp.w2", "experts.mlp.activation_fn", "top_k",
        ("route_tokens_to_experts",), _norm_of_weights, transposed=True, experts="experts.num_experts",
    ),
    Form(("input_linear.weight",), "output_linear.weight", "activation", "router.top_k", ("bias",), _sorted),  # JetMoE
)  # fmt: skip


def form_of(module: nn.Module) -> Form | None:
    """Return the form of a module of experts that transformers does not hand to a function; None for other modules."""
    return next((form for form in FORMS if _fits(module, form)), None)


def _fits(module: nn.Module, form: Form) -> bool:
    dims = 3 if form.experts is None else 2
    for path in (*form.inputs, form.down):
        matrix = get(module, path)
        if not isinstance(matrix, nn.Parameter) or matrix.dim() != dims:
            return False
    return all(get(module, path) is not None for path in (*form.marks, form.act, form.count))
