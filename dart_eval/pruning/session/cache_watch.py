"""The KV cache that the masks of a session belong to."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dart_eval.util.errors import UserError

FOLLOWED = "_followed_by"


class CacheWatch:
    """Knows the cache of the last forward, refuses another, and follows beams that change places in it.

    Args:
        reorder: called with the beams ([B] indices) when they do; None: masks do not follow them.
    """

    def __init__(self, reorder: Callable[[Tensor], None] | None) -> None:
        self.tokens = 0  # that the cache held after the last forward
        self._reorder = reorder
        self._cache: Callable[[], Any] = lambda: None  # a weak reference, once there is a cache

    @property
    def cache(self) -> Any:
        """The cache, or None."""
        return self._cache()

    def check(self, cache: Any, past: int, has_masks: bool) -> None:
        """Refuse a cache that is not what the last forward left.

        Args:
            cache, past: of the next forward, and the tokens in it.
            has_masks: masks of sequences of their own are in force.

        Raises:
            UserError: it went back, or is another.
        """
        known = self._cache()
        if not past or not has_masks:
            return
        if past < self.tokens and known is cache:
            raise UserError(
                f"the KV cache went back from {self.tokens} to {past} tokens under prune()",
                "masks cannot be undone: do not use an assistant model or prompt lookup, and give a turn that "
                "replaces another a new cache",
            )
        if past != self.tokens or (known is not None and known is not cache):
            raise UserError(
                "this KV cache is not the one that the masks under prune() were made with",
                "finish one sequence before the next begins, or use a session for each",
            )

    def follow(self, cache: Any, tokens: int) -> None:
        """Take over the cache of a forward; with it `tokens` it will hold."""
        self.tokens = tokens
        if cache is self._cache() and cache is not None:
            return
        self.leave()
        if cache is None:
            self._cache = lambda: None
            return
        self._cache = weakref.ref(cache)
        if self._reorder is not None:
            # The class and not the instance: a copy of the cache then acts on itself.
            cache.__class__ = _followed(cache.__class__)
            cache.__dict__[FOLLOWED] = weakref.ref(self)

    def take(self, output: Any, model: str) -> None:
        """Take over the cache that a forward has made itself. output: what came out; model: its class, for people.

        Raises:
            UserError: it has made none.
        """
        self.follow(cache_in(output, model), self.tokens)

    def leave(self) -> None:
        """Let the cache be what it was."""
        cache = self._cache()
        if isinstance(cache, _Followed):
            cache.__class__ = type(cache).__mro__[2]
            cache.__dict__.pop(FOLLOWED, None)

    def reordered(self, cache: Any, beams: Tensor) -> None:
        """Beams have changed places in a cache that may be a copy of ours."""
        if cache is self._cache() and self._reorder is not None:
            self._reorder(beams)


def cache_in(output: Any, model: str) -> Any:
    """The KV cache that a forward has made. output: what came out; model: its class, for people.

    Raises:
        UserError: it has made none.
    """
    values = output if isinstance(output, (tuple, list)) else vars(output).values()
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    if cache is None:
        raise UserError(
            f"{model} gave no KV cache: under prune() each forward would be a new prompt",
            "leave use_cache on and gradient checkpointing off; prune() needs a model with a KV cache",
        )
    return cache


def check_cache(cache: Any, use_cache: bool | None) -> None:
    """Refuse a forward whose KV cache tells no length, or that wants none.

    Raises:
        UserError: with the reason.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise UserError(
            f"the KV cache is a {type(cache).__name__}, and prune() needs one of transformers' classes",
            "use DynamicCache, or let the model make one",
        )
    if use_cache is False and cache is None:
        raise UserError(
            "under prune() a forward without KV cache would always be a new, dense prompt", "leave use_cache on"
        )


class _Followed:
    """A cache that tells a watch when its beams change places. Its copies are plain ones."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        make, (cls, *rest), state, *items = parts
        return make, (cls.__mro__[2], *rest), {k: v for k, v in state.items() if k != FOLLOWED}, *items

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        watch = self.__dict__.get(FOLLOWED, lambda: None)()
        if watch is not None:
            watch.reordered(self, beam_idx)


@functools.cache
def _followed(cls: type) -> type:
    return cls if issubclass(cls, _Followed) else type(cls.__name__, (_Followed, cls), {"__module__": cls.__module__})
