"""Rotary angles that depend on the length of the whole input (`longrope`: Phi-3; `dynamic`).

transformers chooses them anew in every forward, by the largest position in it: a row would turn by those of the longest
row beside it, a context by other ones than the answer that follows, and under `dynamic` by those of a longer one that
ran before (in stock lm-eval too). A model just loaded that runs a row alone and whole has the right ones. So rows run
together only where their own lengths give them the same angles, and every forward of theirs, the context's too, uses
these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dart_eval.util.errors import UserError
from dart_eval.util.text import Json


class Angles:
    """The rotary angles of one model, by the length of a row.

    Raises:
        UserError: they depend on the length, and the modules that make them are not found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        kinds = list(_kinds(getattr(config, "rope_parameters", None)))
        # Up to these lengths nothing changes; beyond it there are other angles, or (`dynamic`) others at every length.
        self._switches = sorted(
            int(p["original_max_position_embeddings"]) for p in kinds if p["rope_type"] == "longrope"
        )
        self._grows = any("dynamic" in p["rope_type"] for p in kinds)
        self._from = int(config.max_position_embeddings) if self._grows else 0
        self._modules = [m for m in model.modules() if hasattr(m, "rope_type")] if self._switches or self._grows else []
        if (self._switches or self._grows) and not self._modules:
            raise UserError(
                f"{type(model).__name__} turns positions by angles that depend on the length, and dart-eval cannot "
                "find the module that computes them",
                "use the model's class from transformers: only its rotary modules can be given a length",
            )

    def least_length(self, length: int) -> int:
        """The least length with the angles of a row of `length` tokens; 0 for those of the shortest."""
        if self._grows and length > self._from:
            return length
        return max((n + 1 for n in self._switches if n < length), default=0)

    def together(self, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return the rows (indices) that may generate together, in order: the angles of their positions never change.

        Args:
            spans: of each row, the length of its prompt, and that with all new tokens.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (first, last) in enumerate(spans):
            same = self.least_length(first) == self.least_length(last)
            groups.setdefault((self.least_length(first), -1 if same else i), []).append(i)
        return list(groups.values())

    @contextmanager
    def held(self, angles: int) -> Iterator[None]:
        """Turn by the angles of rows of that many tokens inside (see `least_length`). The rows may be shorter."""
        self.reset()
        with ExitStack() as hooks:
            for module in self._modules if angles else ():
                hooks.enter_context(module.register_forward_pre_hook(_longer(angles), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(_without_last))
            yield

    def reset(self) -> None:
        """Forget the lengths of earlier forwards."""
        for module in self._modules if self._grows else ():  # at position 0 alone `dynamic` ones go back to the first
            buffer = next(module.buffers())
            x, position = buffer.new_zeros(1, 1), torch.zeros(1, 1, dtype=torch.long, device=buffer.device)
            for kind in module.rope_type if isinstance(module.rope_type, dict) else (None,):
                module(x, position, *([] if kind is None else [kind]))


def _kinds(parameters: object) -> Iterator[Json]:
    """Rotary parameters with a type: one dictionary, or one for each type of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        for value in parameters.values():
            yield from _kinds(value)


def _longer(length: int) -> Callable[..., tuple[object, object]]:
    """A hook that gives a rotary module one more position, the last of an input of that length."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, object]:
        def add(positions: Tensor) -> Tensor:
            return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), length - 1)], -1)

        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": add(kwargs["position_ids"])}
        return (args[0], add(args[1]), *args[2:]), kwargs

    return hook


def _without_last(_module: nn.Module, _args: object, output: Any) -> Any:
    """A hook that drops the position which `_longer` added. output: tensors [..., T, E]."""
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return type(output)(part[..., :-1, :] for part in output)
