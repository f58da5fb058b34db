"""What a method keeps and computes beside the model, on the shapes of a model of which no weights are at hand.

The state is the real one: allocated, fed with random activations of the right shapes, and measured. FLOPs are counted
from the shapes (`cost`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dart_eval import cost, shapes
from dart_eval.errors import UserError
from dart_eval.ffn import describe
from dart_eval.pruning.method import Method, PromptMethod, StaticMethod
from dart_eval.pruning.state import SequenceState

MEGABYTE = 10**6
CHUNK = 64  # prompt tokens fed at a time


@dataclass(frozen=True)
class Overhead:
    """Of one method at one sparsity on one shape.

    Attributes:
        state_bytes: prompt length in tokens -> bytes kept per sequence.
        parts: bytes by what they are for, at the longest prompt.
        decode_share: FLOPs per decoded token (detector, picking) over those of a dense token.
        scoring_share: FLOPs per prompt token (scores, sensitivity, detector) over those of a dense token.
        remask_tokens: FLOPs of one renewal of all masks, in dense tokens.
        remask_every: tokens between steady renewals, 0 if there are none; those after alarms depend on the text.
        remask_read: FFN weights that one renewal reads / all FFN weights (see `cost.Tracing`).
    """

    method: str
    shape: str
    sparsity: float
    state_bytes: dict[int, int]
    parts: dict[str, int]
    decode_share: float
    scoring_share: float
    remask_tokens: float
    remask_every: int
    remask_read: float


def measure(
    method: Method, shape: str, sparsity: float, prompts: tuple[int, ...] = (128, 1024), context: int = 1024
) -> Overhead:
    """Measure the state after prompts of these lengths, and count FLOPs at a context of `context` tokens.

    Raises:
        UserError: unknown shape.
    """
    if not method.prunes:
        raise UserError(f"{method.name} keeps and computes nothing", "choose a method that prunes")
    model = shapes.without_weights(shape)
    ffns = describe(model)
    sizes = cost.shape_of(model, ffns)
    dense = sizes.decode(context + 1)
    added = cost.tracing(method, sizes, context, 1 - sparsity)
    state: dict[int, int] = {}
    parts: dict[str, int] = {}
    for length in sorted(prompts):
        state[length], parts = _state(method, ffns, sparsity, length)
    return Overhead(
        method.name, shape, sparsity, state, parts, added.decode_step / dense, added.prefill / context / dense,
        added.remask / dense, method.renewal.every if isinstance(method, PromptMethod) else 0,
        added.remask_read,
    )  # fmt: skip


@torch.no_grad()
def _state(method: Method, ffns: list[Any], sparsity: float, tokens: int) -> tuple[int, dict[str, int]]:
    """Bytes in all and by part, after a prompt of random activations."""
    if isinstance(method, StaticMethod):
        masks = sum(f.size for f in ffns)  # one bool a neuron, for all sequences
        return masks, {"masks": masks}
    assert isinstance(method, PromptMethod)
    factors = _factors(method, ffns)
    state = SequenceState(ffns, method, sparsity, 1, torch.device("cpu"))
    width = ffns[0].width
    for start in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - start)
        valid = torch.ones(1, n, dtype=torch.bool)
        stream = torch.randn(1, n, width, dtype=torch.bfloat16)
        h = torch.randn(1, n, ffns[0].size, dtype=torch.bfloat16)
        for ffn in ffns:
            if state.ring is not None:
                state.ring.write(ffn.layer, stream, valid)
            state.observe_hidden(ffn.layer, h, valid, h if state.two_stage and ffn.matrices == 3 else None)
            if method.layer_allocation == "depth":
                state.observe_change(ffn.layer, stream, stream.flip(-1), valid)
        state.observe_attention(stream, valid)
        state.finish_context(valid)

    def bytes_of(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    parts = {
        "scores": bytes_of([*state.energy, *state.up]) + factors,
        "masks": bytes_of(state.masks or []),
        "compensation": bytes_of([*state.mean, *(state.constants or [])]),
        "recent inputs": state.ring.nbytes() if state.ring is not None else 0,
        "detector": state.detector.nbytes() if state.detector is not None else 0,
    }
    total = state.nbytes() + factors
    return total, {**parts, "other": total - sum(parts.values())}


def _factors(method: PromptMethod, ffns: list[Any]) -> int:
    """Bytes of a method's factors on the neurons' scores, fp32, for all sequences."""
    weighed = method.params().get("score", "magnitude") != "magnitude" or method.params().get("down_norm", False)
    return 4 * sum(f.size for f in ffns) if weighed else 0
