"""A method at work on a model. The life of one forward:

    begin (pre-hook of the decoder)  which phase is this, which tokens are real
    each layer                       context: observe h and the stream;  decode: prune h
    end (hook of the decoder)        context: make masks;  decode: ask the detector, make new masks

Masks change only in `end`, never inside a forward. `execution` decides how pruned forwards are computed.

The KV cache decides the phase: an empty cache starts new sequences, and one token on a filled cache is decoding. Tokens
of the prompt of `generate`, and of forwards inside `prompt()`, extend the context (chunked prefill, a further turn):
they run dense, are observed, and new masks are made. Other forwards of several tokens on a filled cache are refused,
since they may or may not be prompt. A cache that lost tokens since the last forward (assisted decoding, a turn rolled
back) is refused, as observations cannot be undone. If masks are made from the prompt, so is a cache that was filled
before the session. The evaluation sets phases itself with `context()` and `decode()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session.cache import CacheWatch, cache_in, check_cache, real_tokens
from dart_eval.pruning.session.calls import Calls
from dart_eval.pruning.session.execution import Execution, Wanted
from dart_eval.pruning.session.hooks import Forward, Hooks, Phase, named_arguments
from dart_eval.pruning.session.log import Log, Step, Tally
from dart_eval.pruning.session.prepared import Prepared, prepare
from dart_eval.pruning.session.state import SequenceState
from dart_eval.pruning.session.stats import SessionStats
from dart_eval.util.errors import UserError


class Session(SessionStats):
    """One method at work on one model. `prune` makes it.

    Attributes:
        log: notes since the last new context.
    """

    def __init__(
        self, model: nn.Module, method: Pruner, sparsity: float, calibration: Calibration | None = None,
        execution: Wanted = "auto", shared_mask: bool = False,
    ) -> None:  # fmt: skip
        self.sparsity = sparsity if method.sized else 0.0
        self.model, self.shared_mask, self.ffns = model, shared_mask, find_ffns(model)
        self.method = method
        self.executing = Execution(self.ffns, method, execution, shared_mask)
        self.prepared: Prepared = prepare(method, self.ffns, self.sparsity, calibration)
        self.executing.attach(self.prepared.beside)
        self.log, self.forward = Log(), Forward()
        self._step: Step | None = None  # weights of decoding forwards, until something changes them
        self._forced: Phase | None = None
        self._given_valid: Tensor | None = None
        self._tally = Tally()
        self._cache, self._prompting = CacheWatch(), False
        self._calls = Calls(model, method.keeps_state, self.executing.widen)
        self._hooks = Hooks(model, self.ffns, method, self.forward, self.prepared.beside)

    def __repr__(self) -> str:
        execution = self.execution if self.state is not None else self.executing.wanted
        return f"<{self.method.spec} at sparsity {self.sparsity:g} on {len(self.ffns)} layers, execution {execution}>"

    @property
    def prompts_on_codes(self) -> bool:
        """Whether prompts run on codes in place of the weights."""
        beside = self.prepared.beside
        return beside is not None and beside.replaces

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Treat forwards inside as prompt, even on a filled cache (a chunk, a further turn): dense, then new masks."""
        before, self._prompting = self._prompting, True
        try:
            yield
        finally:
            self._prompting = before

    # -- phases set by the evaluation ------------------------------------------------------------------------

    def context(self, valid: Tensor) -> AbstractContextManager[None]:
        """Run the dense context of new sequences inside. valid: [B, T] bool, False for padding."""
        self.state = None
        return self._force("context", valid)

    def extend(self, new: Tensor) -> AbstractContextManager[None]:
        """Extend the dense contexts of the sequences in `state` inside (see `fork`).

        new: [B, T] bool, the tokens that the state has not seen; the forward may compute others again.
        """
        return self._force("context", new)

    def decode(self, valid: Tensor, frozen: bool = False) -> AbstractContextManager[None]:
        """Run a pruned forward inside, under the current masks. valid: [B, T] bool.

        T <= `room()`, unless the masks are `frozen`: then nothing is observed and no new mask is made.
        """
        return self._force("decode", valid, frozen)

    def foresee(self, valid: Tensor) -> AbstractContextManager[None]:
        """Run a dense rehearsal inside: masks are made from its tokens alone. valid: [B, T] bool."""
        if self.state is not None:
            self.state.forget()
        return self._force("context", valid)

    def no_context(self, batch: int, device: torch.device) -> None:
        """Begin new sequences without context; they run dense if masks need one."""
        self._step = None
        self.state = self._without_context(batch, device)

    def room(self) -> int | None:
        """Return the tokens that may run in one decoding forward before masks may change; None for any number."""
        return self.state.room() if self.state else None

    def fork(self, state: SequenceState | None, rows: Tensor) -> None:
        """Continue from `state` (earlier `session.state`) with its sequences `rows`, repeats allowed."""
        self._step = None
        self.state = state.select(rows) if state is not None else None
        self.log = Log()

    @contextmanager
    def _force(self, phase: Phase, valid: Tensor, frozen: bool = False) -> Iterator[None]:
        self._forced, self._given_valid, self.forward.frozen = phase, valid, frozen
        try:
            yield
        finally:
            self._forced, self._given_valid, self.forward.frozen = None, None, False

    # -- one forward -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        self._calls.check_thread()
        forward, named = self.forward, named_arguments(module, args, kwargs)
        tokens = next(t for t in map(named.get, ("input_ids", "inputs_embeds")) if t is not None)
        batch, length = tokens.shape[:2]
        cache = named.get("cache", named.get("past_key_values"))
        self._check(cache, named)
        past = int(cache.get_seq_length()) if cache is not None else 0
        forward.has_cache = cache is not None
        self._set_phase(cache, past, length)
        mask, valid = named.get("attention_mask"), self._given_valid
        forward.valid = real_tokens(mask, cache, past, batch, length, tokens.device) if valid is None else valid
        forward.going = forward.valid
        chunk = bool(past) and forward.last == "context" and forward.turn == self._calls.turn
        forward.turn = self._calls.turn
        self.executing.widen()  # an exception may have left it sliced
        if not past:
            self.log = Log()
        self._begin_sequences(batch, tokens.device, past)
        if forward.phase == "decode":
            self._begin_decode(tokens, batch, length)
        else:
            self._step = None
            if self._forced is None:
                self._tally.context(batch, chunk)
        forward.seen.clear()
        forward.watching = not self.executing.sliced
        self._hooks.watch_ffns(forward.watching)
        if forward.phase == "context" and kwargs.get("logits_to_keep"):
            # Layers that share keys and values would compute only the last tokens (Gemma 4), and masks need all.
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _begin_sequences(self, batch: int, device: torch.device, past: int) -> None:
        """Set the execution and the state for the sequences of a forward."""
        by_hand = self._forced is None
        if self.state is not None and self.state.batch != batch and not self.method.keeps_state:
            self.state = None  # it holds nothing per sequence
        if not past or not by_hand or self.state is None:
            self.executing.choose(batch, by_hand)
        if self.state is not None and self.state.batch != batch:
            raise UserError(
                f"the batch changed from {self.state.batch} to {batch} sequences while decoding under prune()",
                "masks are per sequence: use greedy search or sampling (num_beams=1), with one cache per batch",
            )
        if self.state is not None:
            return
        if past and by_hand and self.method.needs_context:
            raise UserError(
                f"the KV cache holds {past} tokens that prune() has not seen, and masks are made from the whole prompt",
                "run all of it inside the block",
            )
        if self.forward.phase == "decode":
            self.state = self._without_context(batch, device)
            self.executing.move(self.state)
        else:
            self.state = SequenceState(self.prepared, batch, device, self.shared_mask)

    def _check(self, cache: Cache | None, kwargs: dict[str, Any]) -> None:
        """Refuse forwards that a session cannot follow."""
        check_cache(cache, kwargs.get("use_cache"))
        if self._forced is None and self.looks_ahead:
            raise UserError(
                f"{self.method.name} looks ahead at the text to be scored, which a forward called by hand lacks",
                "use it with `dart-eval run` on tasks that score answers",
            )

    def _set_phase(self, cache: Cache | None, past: int, length: int) -> None:
        if self._forced is not None:
            self.forward.phase = self._forced
            return
        self._cache.check_tokens(cache, past, self.state is not None and self.method.keeps_state)
        decodes = past >= max(self._calls.prompt, 1) and not self._prompting
        if decodes and length > 1:
            raise UserError(
                f"a forward of {length} tokens after {past} cached ones does not tell prune() whether they are prompt, "
                "which runs dense",
                "decode tokens one by one (no assistant model, no prompt lookup); run a prompt's chunks and turns "
                "through generate(), or inside `with session.prompt():`",
            )
        self._cache.follow(cache, past + length)
        self.forward.phase = "decode" if decodes else "context"
        if not past:
            self.state = None

    def _begin_decode(self, tokens: Tensor, batch: int, length: int) -> None:
        assert self.state is not None
        if self._step is None:
            self._step = self.state.step()
        self.log.steps.append(self._step)
        self.log.decoded += length
        if self._forced is None and batch > 1 and self._calls.ends and not tokens.is_floating_point():
            ended = torch.isin(tokens[:, -1:], torch.tensor(sorted(self._calls.ends), device=tokens.device))
            self.forward.going = self.forward.valid & ~ended
        self.executing.slice(self._step)

    @torch.no_grad()
    def _end(self, _module: nn.Module, _args: tuple[object, ...], output: object) -> None:
        forward = self.forward
        attention, forward.attention = forward.attention, None
        # From here on nothing is a forward, a re-mask's own projections included.
        phase, forward.phase = forward.phase, "off"
        forward.last = phase
        self.executing.widen()
        if not forward.has_cache:
            self._cache.follow(cache_in(output, type(self.model).__name__), self._cache.tokens)
        if forward.watching and (self.state is not None or phase == "decode"):
            self._hooks.check_ran()
        state = self.state
        if state is None:
            return
        if phase == "context":
            state.finish_context(forward.valid)
            self.executing.move(state)
            return
        measured = state.measured(forward.valid)
        if measured is not None:
            self.log.steps[-1] = measured
        ended = None if forward.going is forward.valid else ~forward.going[:, -1]
        self._tally.decode(self.log.steps[-1].read, forward.valid.shape[1], ended)
        if state.masked and not forward.frozen:
            self._finish_decode(state, attention)

    def _finish_decode(self, state: SequenceState, attention: Tensor | None) -> None:
        """Run the detector, and make the new masks that are due."""
        remasking = state.remasking
        changes = state.finish_decode(attention, self.forward.going)
        if attention is not None and remasking is not None and remasking.detector is not None and not state.released:
            self.log.watched(remasking.detector, remasking.alarms)
        if changes or self.method.mask.remask.dense_tokens or state.released:
            self._step = None
        if changes:
            self.executing.move(state)
        for change in changes:
            self.log.events.append({"step": len(self.log.steps), "token": self.log.decoded, **vars(change)})

    def attach(self) -> None:
        """Install the hooks that the method needs."""
        if self.prunes:
            self._calls.watch()
            self._hooks.install(self._begin, self._end)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run forwards inside without hooks: dense and unobserved."""
        self._hooks.remove()
        try:
            yield
        finally:
            self._hooks.install(self._begin, self._end)

    def detach(self) -> None:
        """Remove every hook and restore the projections' weights."""
        try:
            self._hooks.remove()
            self._calls.release()
        finally:
            self.executing.restore()
