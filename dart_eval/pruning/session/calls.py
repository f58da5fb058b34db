"""Replacements of a model's own methods while a session lasts.

Only `generate` knows where its prompt ends and which tokens end a sequence. What a session cannot follow is refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dart_eval.layers.guard import GUARD, refuse_second
from dart_eval.util.errors import UserError

ABSENT = object()
SETTINGS = ("eos_token_id", "pad_token_id", "num_beams")
CONTINUOUS = ("generate_batch", "init_continuous_batching")


class Calls:
    """The methods of one model that a session has replaced.

    Args:
        keeps_state: whether sequences have masks of their own.
        settle: called after each `generate`, however it ended.

    Attributes:
        prompt: tokens of the prompt of the running `generate`, cached ones included; 0 outside of it.
        ends: ids of the tokens that end its sequences, and of their padding; none if no token does.
        turn: calls of `generate` so far.
    """

    def __init__(self, model: nn.Module, keeps_state: bool, settle: Callable[[], None]) -> None:
        self.model, self.keeps_state, self.settle = model, keeps_state, settle
        self.prompt = 0
        self.ends: frozenset[int] = frozenset()
        self.turn = 0
        self._thread = threading.get_ident()
        self._before: list[tuple[nn.Module, str, object]] = []  # earlier entries of a module's `__dict__`

    def watch(self) -> None:
        """Replace the methods.

        Raises:
            UserError: another session is at work on this model.
        """
        refuse_second(self.model)
        generate = getattr(self.model, "generate", None)
        for module in self.model.modules():
            self._put(module, GUARD, True)
        for name in CONTINUOUS:
            if hasattr(self.model, name):
                self._put(self.model, name, _refuse_continuous_batching)
        if callable(generate):
            self._put(self.model, "generate", functools.partial(self._generate, generate))

    def _put(self, module: nn.Module, name: str, value: object) -> None:
        self._before.append((module, name, module.__dict__.get(name, ABSENT)))
        module.__dict__[name] = value

    def release(self) -> None:
        """Restore the methods."""
        for module, name, before in reversed(self._before):
            if before is ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
        self._before = []

    def check_thread(self) -> None:
        """Refuse a forward of another thread than the block's: both would write one state.

        Raises:
            UserError: it is another one.
        """
        if threading.get_ident() != self._thread:
            raise UserError(
                "a model under prune() runs in the thread of the block alone", "enter the block in the other thread"
            )

    def _generate(self, generate: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        before = self.prompt, self.ends
        self.turn += 1
        values = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"))]
        self.prompt = max((int(t.shape[1]) for t in values if t is not None), default=0)
        config = kwargs.get("generation_config") or next((a for a in args[1:2] if a is not None), None)
        configs = (config, getattr(self.model, "generation_config", None))  # what the first lacks is the model's
        own = {n: next((v for c in configs if (v := getattr(c, n, None)) is not None), None) for n in SETTINGS}
        own |= {n: kwargs[n] for n in SETTINGS if n in kwargs}
        if self.keeps_state and (own["num_beams"] or 1) > 1:
            raise UserError(
                "beams change places, and masks under prune() stay with their sequences",
                "use greedy search or sampling (num_beams=1)",
            )
        ends, pads = _ids(own["eos_token_id"]), _ids(own["pad_token_id"])
        self.ends = frozenset([*ends, *pads] if ends else [])  # where no token ends a sequence, none is padded
        try:
            return generate(*args, **kwargs)
        finally:
            self.prompt, self.ends = before
            self.settle()


def _ids(value: object) -> list[int]:
    """Return token ids in any form that `generate` takes: none, one, several, or a tensor of them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _refuse_continuous_batching(*_args: object, **_kwargs: object) -> object:
    raise UserError(
        "continuous batching runs prompts and decoded tokens in one forward, which prune() cannot follow",
        "use generate()",
    )
