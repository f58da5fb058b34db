"""Replacements of a model's own methods while a session lasts.

Only `generate` knows where its prompt ends and which tokens end a sequence. Methods that would change the weights, or
run the model in a way that the session cannot follow, are refused at the call. The replacements are in the modules'
`__dict__`, where a copy of a module would take them along with the hooks, so copying is refused too.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers.guard import GUARD, refuse_second
from dart_eval.util.errors import UserError

ABSENT = object()
STOPS = ("eos_token_id", "pad_token_id")
TORCH = str(Path(torch.__file__).parent)
CONTINUOUS = ("generate_batch", "init_continuous_batching")


class Calls:
    """The methods of one model that a session has replaced.

    Attributes:
        prompt: tokens of the prompt of the running `generate`, cached ones included; 0 outside of it.
        ends: ids of the tokens that end its sequences, and of their padding; none if no token does.
        turn: calls of `generate` so far.
        alone: held by the thread that generates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prompt = 0
        self.ends: frozenset[int] = frozenset()
        self.turn = 0
        self.alone, self._entering = threading.RLock(), threading.Lock()
        self._generating: int | None = None  # the thread that does
        self._inside: int | None = None  # the thread that generates or runs a forward
        self._before: list[tuple[nn.Module, str, object]] = []  # earlier entries of a module's `__dict__`

    def watch(self, settle: Callable[[], None]) -> None:
        """Replace the methods.

        Args:
            settle: called after each `generate`, however it ended.

        Raises:
            UserError: another session is at work on this model.
        """
        refuse_second(self.model)
        generate = getattr(self.model, "generate", None)
        for module in self.model.modules():
            self._put(module, GUARD, self)
            # `_apply` is what `to`, `half`, `cuda` and the like end in.
            self._put(module, "_apply", functools.partial(_leaves_alone, module))
            self._put(module, "load_state_dict", _refuse_weights)
            self._put(module, "__reduce_ex__", _refuse_copy)  # copy.deepcopy and pickle ask the object for it
        for name in CONTINUOUS:
            if hasattr(self.model, name):
                self._put(self.model, name, _refuse_continuous_batching)
        if callable(generate):
            self._put(self.model, "generate", functools.partial(self._generate, generate, settle))

    def _put(self, module: nn.Module, name: str, value: object) -> None:
        self._before.append((module, name, module.__dict__.get(name, ABSENT)))
        module.__dict__[name] = value

    def release(self) -> None:
        """Restore the methods."""
        while self._before:
            module, name, before = self._before[-1]
            if before is ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
            self._before.pop()

    def enter(self) -> None:
        """Begin a forward in this thread.

        Raises:
            UserError: another thread generates or runs a forward, whose state both would write.
        """
        here = threading.get_ident()
        with self._entering:
            if self._inside not in (None, here) and _is_in_torch(self._inside):
                raise UserError(
                    "another thread is running this model, and prune() follows one at a time",
                    "call generate(), which waits for its turn, or give each thread a model of its own",
                )
            self._inside = here

    def leave(self) -> None:
        """End a forward."""
        self._inside = self._generating

    def _generate(
        self, generate: Callable[..., object], settle: Callable[[], None], *args: Any, **kwargs: Any
    ) -> object:
        with self.alone:
            try:
                return self._generate_alone(generate, *args, **kwargs)
            finally:
                settle()

    def _generate_alone(self, generate: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        self.enter()
        before = self.prompt, self.ends, self._generating
        self._generating = self._inside
        self.turn += 1
        values = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"))]
        self.prompt = max((int(t.shape[1]) for t in values if t is not None), default=0)
        config = kwargs.get("generation_config") or next((a for a in args[1:2] if a is not None), None)
        configs = (config, getattr(self.model, "generation_config", None))  # what the first lacks is the model's
        own = {n: next((v for c in configs if (v := getattr(c, n, None)) is not None), None) for n in STOPS}
        ends, pads = (_ids(kwargs.get(n, own[n])) for n in STOPS)
        self.ends = frozenset([*ends, *pads] if ends else [])  # where no token ends a sequence, none is padded
        try:
            return generate(*args, **kwargs)
        finally:
            self.prompt, self.ends, self._generating = before
            self.leave()


def _is_in_torch(thread: int | None) -> bool:
    """Whether a thread runs a module now: an exception may have ended its forward without our knowledge."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame is not None


def _ids(value: object) -> list[int]:
    """Return token ids in any form that `generate` takes: none, one, several, or a tensor of them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _leaves_alone(
    module: nn.Module, change: Callable[[Tensor], Tensor], *_args: object, **_kwargs: object
) -> nn.Module:
    """Replace `module._apply(change)`: do nothing if the weights already have the dtype and device, else refuse."""
    for dtype, device in {(t.dtype, t.device) for t in [*module.parameters(), *module.buffers()]}:
        changed = change(torch.empty(0, dtype=dtype, device=device))
        if (changed.dtype, changed.device) != (dtype, device):
            _refuse_weights()
    return module


def _refuse_weights(*_args: object, **_kwargs: object) -> object:
    raise UserError(
        "the weights of a model under prune() must stay as they are", "move, cast or load them before the block"
    )


def _refuse_copy(*_args: object) -> object:
    raise UserError(
        "a copy of a model under prune() would act on the original", "copy or pickle it before the block, or after it"
    )


def _refuse_continuous_batching(*_args: object, **_kwargs: object) -> object:
    raise UserError(
        "continuous batching runs prompts and decoded tokens in one forward, which prune() cannot follow",
        "use generate()",
    )
