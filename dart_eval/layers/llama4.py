"""Llama 4's experts, which transformers does not hand to a function: its block calls them with all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from dart_eval.layers.families import get


class Llama4Experts:
    """The experts of a block with transformers' interface: see `use_experts_implementation` there.

    The router's weight multiplies x, not an expert's output.
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


def run(block: Any, steps: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the block's forward: experts take x times the router's weight; all others x times 0, which gives 0.

    Args:
        steps: x [N, D], experts [N, count], their weights -> [N, D].
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, index = scores.topk(block.top_k)
    return block.shared_expert(x) + steps(x, index, weights), logits


def is_block(module: nn.Module) -> bool:
    """Whether this is a block of Llama 4 with experts of plain weights."""
    matrices = get(module, "experts.gate_up_proj"), get(module, "experts.down_proj")
    return all(isinstance(m, nn.Parameter) and m.dim() == 3 for m in matrices) and all(
        get(module, name) is not None for name in ("router", "shared_expert", "experts.act_fn", "top_k")
    )
