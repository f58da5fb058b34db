"""A session: a method at work on a model. It knows phases, padding and hooks, and no method. The life of one forward:

    begin (pre-hook of the decoder)  which phase is this, which tokens are real
    each layer                       context: `observe` h;  decode: `decode` h, `forwards` in place of products
    end (hook of the decoder)        context: `finish`, which makes masks;  decode: `read`, then `after`

Masks change only in `end`, never inside a forward. No weight is ever written: hooks are removed, and replaced forwards
restored.

The KV cache decides the phase: an empty cache starts new sequences, and one token on a filled cache is decoding. Tokens
of the prompt of `generate`, and of forwards inside `prompt()`, extend the context (chunked prefill, a further turn):
they run dense, are observed, and new masks are made. Other forwards of several tokens on a filled cache are refused,
since they may or may not be prompt. A cache that lost tokens since the last forward (assisted decoding, a turn rolled
back) is refused, unless `rewind` took them back. If masks are made from the prompt, so is a cache that was filled
before the session. The evaluation sets phases itself with `context()` and `decode()`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from dart_eval.kernels.fast import Fast
from dart_eval.kernels.mask_rows import Swap, replacing
from dart_eval.layers import experts
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import GUARD, decoder, find_ffns, refuse_second
from dart_eval.pruning import cost
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.log import Log, Step, Tally
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.dense import Dense
from dart_eval.pruning.registry import check_sparsity, make, parse
from dart_eval.pruning.rows import Rows, nbytes
from dart_eval.util.bits import OWN_BITS, unread
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json
from dart_eval.weights import rounding

Phase = Literal["off", "context", "decode"]
SETTINGS = ("eos_token_id", "pad_token_id", "num_beams")
MASK_REMEDY = "pass attention_mask of shape [batch, cached and new tokens]"


@contextmanager
def prune(
    model: nn.Module,
    method: str | Method = "dart",
    sparsity: float = 0.5,
    *,
    tokenizer: object = None,
    calibration: Calibration | str | Path | None = None,
    execution: Literal["auto", "masked"] = "auto",
    shared_mask: bool = False,
) -> Iterator[Session]:
    """Prune the FFN neurons of `model` while the block runs. Afterwards the model is as it was, bit for bit.

    The prompt (prefill) runs dense, and every decoded token pruned:

        with prune(model, "dart", sparsity=0.7) as session:
            model.generate(**inputs)

    Args:
        model: a Hugging Face causal language model with a gated or plain FFN.
        method: a spelling as on the command line (`dart`, `dart:remask.window=8`), or a `Method`.
        sparsity: share of the FFN weights that a decoded token does not read, in [0, 1).
        tokenizer, calibration: of methods that read a text (`wanda-sp`): another file, or a ready `Calibration`.
        execution: `auto` multiplies copies of a mask's rows, or runs a kernel, where one sequence allows it; `masked`
            multiplies by zeros, which saves no time.
        shared_mask: all sequences of a batch have one mask.

    Yields:
        The `Session`, with effective sparsity, memory and re-masks.

    Raises:
        UserError: an unknown name, a sparsity outside [0, 1), or an FFN or weights that the method does not support.
    """
    check_sparsity(sparsity)
    refuse_second(model)
    if isinstance(method, str):
        method = make(*parse(method))
    if not isinstance(method, Method):
        raise UserError(f"method {method!r} is neither a name nor a Method", "for example 'dart'")
    if method.calibrates and not isinstance(calibration, Calibration):
        calibration = Calibration(model, tokenizer, calibration)
    elif not isinstance(calibration, Calibration):
        calibration = None
    session = Session(model, method, sparsity, calibration, execution, shared_mask)
    try:
        session.open()
        yield session
    finally:
        session.close()


class Session:
    """One method at work on one model. `prune` makes it; `Session()` is that of a dense model.

    Attributes:
        method: fitted to the model.
        writer: what writes texts with it; None: the model's own loop, token by token.
        ffns: of the model.
        rows: the current sequences; None before any.
        phase: of the current forward; `off` between forwards.
        valid: [B, T] bool, its tokens that are not padding.
        going: likewise, and False for sequences that ended before.
        tokens: [B, T] ids of the current forward; embeddings, [B, T, D], where it was called with these.
        real: [B, T] bool, its tokens that are not padding: those of `valid`, and those that `extend` computes again.
        frozen: whether nothing is observed while decoding.
        fast: copies of rows, or kernels, by which one sequence decodes faster.
        log: notes since the last new context.
        share: served FFN weight bytes, of which the sparsity is a share / bytes in the model's own dtype.
    """

    def __init__(
        self, model: Any = None, method: Method | None = None, sparsity: float = 0.0,
        calibration: Calibration | None = None, execution: Literal["auto", "masked"] = "auto",
        shared_mask: bool = False,
    ) -> None:  # fmt: skip
        method = method or Dense()
        self.model, self.method, self.shared_mask = model, copy.copy(method.inner), shared_mask
        self.writer = None if method.inner is method else copy.copy(method)
        if self.writer is not None:
            self.writer._inner = self.method
        self.sparsity = sparsity if self.method.sized else 0.0
        self.ffns: list[FFN] = [] if model is None else find_ffns(model)
        self.share = rounding.served_bits(self.ffns) / OWN_BITS if self.ffns else None
        if self.prunes:
            self.method.check(self.ffns, self.sparsity)
        if self.method.calibrates and calibration is None:
            raise UserError(f"method {self.method.name} needs a calibration", "pass tokenizer= to prune()")
        self.method.fit(self.ffns, self.sparsity, calibration)
        self.fast = Fast(self.ffns, self.method, execution, shared_mask)
        self.rows: Rows | None = None
        self.phase: Phase = "off"
        self.valid = self.going = self.real = torch.ones(0, 0, dtype=torch.bool)
        self.tokens = torch.zeros(0, 0, dtype=torch.long)
        self.frozen = False
        self.log = Log()
        self._step: Step | None = None  # what decoding forwards use, until something changes it
        self._forced: tuple[Phase, Tensor, Tensor] | None = None  # phase, valid, real
        self._last: Phase = "off"
        self._tally = Tally()
        self._prompt, self._ends, self._turn, self._last_turn = 0, frozenset[int](), 0, 0
        self._prompting = False
        self._cached = 0  # tokens of the last forward's cache
        self._decoded = 0  # of them since the prompt
        self._cache: Callable[[], Cache | None] = lambda: None  # a weak reference to it
        self._has_cache = True
        self._ran: set[int] = set()  # FFNs that have passed on their h
        self._thread = threading.get_ident()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._own, self._forwards = Swap(), Swap()  # of the model's own methods, and of projections
        self._experts: list[tuple[Any, str, object]] = []

    # -- the model -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Install the hooks that the method needs.

        Raises:
            UserError: another session is at work on this model, or it is compiled.
        """
        if not self.prunes:
            return
        refuse_second(self.model)
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self.model.modules()):
            raise _compiled("give the model itself")
        self._own.entries = [replacing(module, GUARD, True) for module in self.model.modules()]
        for name in ("generate_batch", "init_continuous_batching"):
            if hasattr(self.model, name):
                self._own.entries.append(replacing(self.model, name, _refuse_continuous_batching))
        if callable(generate := getattr(self.model, "generate", None)):
            counted = functools.partial(self._generate, generate)
            self._own.entries.append(replacing(self.model, "generate", counted))
        self._own.begin()
        self._install()

    def close(self) -> None:
        """Remove every hook, and restore the projections' weights and forwards."""
        self._remove()
        self._own.end()
        self._own.entries, self._forwards.entries = [], []  # they hold the model, and a second call restores nothing
        self.fast.drop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run forwards inside without hooks: dense and unobserved."""
        if not self.prunes:
            yield
            return
        self._remove()
        try:
            yield
        finally:
            self._install()

    def _install(self) -> None:
        _drop_compiled_code()
        self._experts = experts.take_over(self.model) if any(f.routed for f in self.ffns) else []
        top, add = decoder(self.model), self._handles.append
        add(self.model.register_forward_pre_hook(_refuse_labels, with_kwargs=True))
        add(top.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(top.register_forward_hook(self._end))
        for ffn in self.ffns:
            add(ffn.into.register_forward_pre_hook(self._on_h(ffn)))
        for module, install, hook in self.method.hooks(self):
            add(getattr(module, install)(hook))
        forwards = self.method.forwards(self).items()
        self._forwards.entries = [replacing(module, "forward", forward) for module, forward in forwards]
        self._forwards.begin()

    def _remove(self) -> None:
        self.fast.end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forwards.end()
        if self._experts:
            experts.give_back(self._experts)
        self._experts = []

    def _generate(self, generate: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        """Run the model's `generate`, which alone knows where its prompt ends and which tokens end a sequence."""
        before = self._prompt, self._ends
        self._turn += 1
        values = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"))]
        self._prompt = max((int(t.shape[1]) for t in values if t is not None), default=0)
        config = kwargs.get("generation_config") or next((a for a in args[1:2] if a is not None), None)
        configs = (config, getattr(self.model, "generation_config", None))  # what the first lacks is the model's
        own = {n: next((v for c in configs if (v := getattr(c, n, None)) is not None), None) for n in SETTINGS}
        own |= {n: kwargs[n] for n in SETTINGS if n in kwargs}
        if (own["num_beams"] or 1) > 1:
            raise UserError("beams change places, which prune() does not follow", "use num_beams=1")
        ends, pads = _ids(own["eos_token_id"]), _ids(own["pad_token_id"])
        self._ends = frozenset([*ends, *pads] if ends else [])  # where no token ends a sequence, none is padded
        if self.writer is not None:
            kwargs["custom_generate"] = functools.partial(self.writer.write, self)
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt, self._ends = before
            self.fast.end()

    # -- phases that the caller sets -------------------------------------------------------------------------------

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Treat forwards inside as prompt, even on a filled cache (a chunk, a further turn): dense, then new masks."""
        before, self._prompting = self._prompting, True
        try:
            yield
        finally:
            self._prompting = before

    def context(self, valid: Tensor) -> AbstractContextManager[None]:
        """Run the dense context of new sequences inside. valid: [B, T] bool, False for padding."""
        self.rows = None
        return self._force("context", valid)

    def extend(self, new: Tensor, real: Tensor | None = None) -> AbstractContextManager[None]:
        """Extend the dense contexts of the sequences in `rows` inside (see `fork`).

        Args:
            new: [B, T] bool, the tokens that they have not seen.
            real: likewise, and those that the forward computes again; None: none.
        """
        return self._force("context", new, real=real)

    def foresee(self, valid: Tensor) -> AbstractContextManager[None]:
        """Run a dense rehearsal inside: masks are made from its tokens alone. valid: [B, T] bool."""
        if self.rows is not None:
            self.method.forget(self.rows)
        return self._force("context", valid)

    def decode(self, valid: Tensor, frozen: bool = False) -> AbstractContextManager[None]:
        """Run a pruned forward inside, under the current masks. valid: [B, T] bool.

        T <= `room()`, unless the masks are `frozen`: then nothing is observed and no new mask is made.
        """
        return self._force("decode", valid, frozen)

    def no_context(self, batch: int, device: torch.device) -> None:
        """Begin new sequences without context; they run dense if masks need one."""
        self.rows, self.log = None, Log()
        if self.prunes:
            self._begin_rows(batch, device)

    def fork(self, rows: Rows | None, index: Tensor) -> None:
        """Continue from `rows` (earlier `session.rows`) with its sequences `index`, repeats allowed."""
        self._step, self.log = None, Log()
        self.rows = None if rows is None else rows.select(index)

    def rewind(self, tokens: int, rows: Rows | None = None) -> None:
        """Take back the last decoded tokens, in the KV cache too. What they read still counts.

        Args:
            tokens: their number.
            rows: the sequences before them (`session.rows.select(...)`), of a method that makes new masks meanwhile.

        Raises:
            UserError: the cache cannot be cut, fewer tokens were decoded, or the method needs `rows`.
        """
        cache: Any = self._cache()
        layers = getattr(cache, "layers", None)
        if not layers or any(not hasattr(x, "crop") or getattr(x, "is_sliding", False) for x in layers):
            raise UserError(f"a {type(cache).__name__} cannot be rewound", "use a DynamicCache of full attention")
        if not 1 <= tokens <= self._decoded:
            raise UserError(f"{tokens} tokens cannot be taken back", f"decoded since the prompt: {self._decoded}")
        if rows is None and type(self.method).after is not Method.after:
            raise UserError(f"{self.method.name} follows the tokens that are taken back", "give the rows before them")
        cache.crop(-tokens)
        self._cached -= tokens
        self._decoded -= tokens
        if rows is not None:
            self.rows, self._step = rows, None
            self.fast.copy_rows(self.method.masks(rows))

    @contextmanager
    def over(self, tokens: int) -> Iterator[None]:
        """Run a dense forward of so many tokens inside, on a filled cache. They then count as decoded ones in it."""
        with self.paused():
            yield
        self._cached += tokens
        self._decoded += tokens

    def spread(self, start: int, tokens: int, read: float) -> None:
        """Let the steps since `start` stand for `tokens` tokens alike, which read this share of the FFN weights, too.

        Some of those that ran may have been taken back, and others have come without a step. One sequence.
        """
        steps = self.log.steps[start:]
        every = Step(*(torch.stack([getattr(s, name) for s in steps]).sum(0) for name in ("read", "mask")))
        self.log.steps[start:] = [Step((every.read + read) / tokens, every.mask / len(steps)) for _ in range(tokens)]
        self.log.decoded = start + tokens
        self._tally.correct(tokens - len(steps) - read, tokens - len(steps))

    def room(self) -> int | None:
        """Return the tokens that may run in one decoding forward before masks may change; None for any number."""
        return None if self.rows is None else self.method.room(self.rows)

    @contextmanager
    def _force(self, phase: Phase, valid: Tensor, frozen: bool = False, real: Tensor | None = None) -> Iterator[None]:
        self._forced, self.frozen = (phase, valid, valid if real is None else real), frozen
        if not self.prunes:  # no hook runs: its forwards are counted here
            self._note(phase, valid)
        try:
            yield
        finally:
            self._forced, self.frozen = None, False

    def _note(self, phase: Phase, valid: Tensor) -> None:
        """Log a forward of a dense model."""
        if phase == "context":
            self.log = Log()
        else:
            self.log.steps.append(Step(*[torch.ones(len(valid), dtype=torch.float64)] * 2))

    # -- one forward -----------------------------------------------------------------------------------------------

    def in_batch(self, x: Tensor) -> Tensor:
        """Return [B, T, ...] of a layer's tensor, which may be [B * T, ...] (OPT)."""
        return x if x.dim() == 3 else x.view(*self.valid.shape, x.shape[-1])

    @torch.no_grad()
    def _begin(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            _refuse_compiled()
        if threading.get_ident() != self._thread:
            raise UserError("a model under prune() runs in the thread of the block alone", "enter the block there")
        named = named_arguments(module, args, kwargs) if args else kwargs
        tokens = named.get("input_ids")
        tokens = named["inputs_embeds"] if tokens is None else tokens
        batch, length = tokens.shape[:2]
        cache = named.get("cache", named.get("past_key_values"))
        check_cache(cache, named.get("use_cache"))
        self._has_cache = cache is not None
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.fast.on:  # an exception left it so
            self.fast.end()
        self.phase = self._forced[0] if self._forced else self._phase(cache, past, length)
        if self._forced:
            _, self.valid, self.real = self._forced
        else:
            self.valid = real_tokens(named.get("attention_mask"), cache, past, batch, length, tokens.device)
            self.real = self.valid
        self.going, self.tokens = self.valid, tokens
        chunk = bool(past) and self._last == "context" and self._last_turn == self._turn
        self._last_turn = self._turn
        if not past:
            self.log = Log()
        self._check_rows(batch, past)
        if not past or self._forced or self.rows is None:
            self.fast.choose(batch, by_hand=self._forced is None)
        if self.rows is None:
            self._begin_rows(batch, tokens.device)
        self._ran.clear()
        if self.phase == "decode":
            self._begin_decode(tokens, length)
            return None
        self._step, self._decoded = None, 0
        if self._forced is None:
            if self.writer is not None and not self._prompt:
                name = self.writer.name
                raise UserError(f"{name} writes whole texts, and this forward is called by hand", "call generate()")
            self._tally.context(batch, chunk)
        if kwargs.get("logits_to_keep"):
            # Layers that share keys and values would compute only the last tokens (Gemma 4), and masks need all.
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _phase(self, cache: Cache | None, past: int, length: int) -> Phase:
        """Return the phase of a forward that a user calls, by its cache."""
        if self.method.looks_ahead:
            raise UserError(
                f"{self.method.name} looks ahead at the text to be scored, which a forward called by hand lacks",
                "use it with `dart-eval run` on tasks that score answers",
            )
        last = self._cache()
        if past and self.rows is not None and self.method.keeps_state and (past != self._cached or last is not cache):
            if past < self._cached and last is cache:
                raise UserError(
                    f"the KV cache went back from {self._cached} to {past} tokens under prune()",
                    "masks cannot be undone: do not use an assistant model or prompt lookup, and use a new cache for a "
                    "turn that replaces another",
                )
            raise UserError(  # ours may be gone, and another be as long
                "this KV cache is not the one that the masks under prune() were made with",
                "finish one sequence before the next begins, or use a session for each",
            )
        decodes = past >= max(self._prompt, 1) and not self._prompting
        if decodes and length > 1:
            raise UserError(
                f"a forward of {length} tokens after {past} cached ones does not tell prune() whether they are prompt, "
                "which runs dense",
                "decode tokens one by one (no assistant model, no prompt lookup); run a prompt's chunks and turns "
                "through generate(), or inside `with session.prompt():`",
            )
        self._follow(cache, past + length)
        if not past:
            self.rows = None
        return "decode" if decodes else "context"

    def _follow(self, cache: Cache | None, tokens: int) -> None:
        self._cached = tokens
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)

    def _check_rows(self, batch: int, past: int) -> None:
        """Refuse sequences that are not those of the forward before."""
        if self.rows is not None and len(self.rows) != batch:
            if self.method.keeps_state:
                raise UserError(
                    f"the batch changed from {len(self.rows)} to {batch} sequences while decoding under prune()",
                    "masks are per sequence: use greedy search or sampling (num_beams=1), with one cache per batch",
                )
            self.rows = None  # it holds nothing per sequence
        if self.rows is None and past and not self._forced and self.method.needs_context:
            raise UserError(
                f"the KV cache holds {past} tokens that prune() has not seen, and masks are made from the whole prompt",
                "run all of it inside the block",
            )

    def _begin_rows(self, batch: int, device: torch.device) -> None:
        self._step = None
        self.rows = Rows(batch, self.ffns, device, self.shared_mask)
        self.method.begin(self.rows)
        self.fast.copy_rows(self.method.masks(self.rows))

    def _begin_decode(self, tokens: Tensor, length: int) -> None:
        if not self.method.exact:
            self.method.clear()
        step = self.step()
        self.log.steps.append(step)
        self.log.decoded += length
        self._decoded += length
        if not self._forced and len(tokens) > 1 and self._ends and not tokens.is_floating_point():
            ended = torch.isin(tokens[:, -1:], torch.tensor(sorted(self._ends), device=tokens.device))
            self.going = self.valid & ~ended
        self.fast.begin(step)

    def _on_h(self, ffn: FFN) -> Callable[..., object]:
        """Return the hook of the module that h enters."""
        method, layer, ran = self.method, ffn.layer, self._ran
        observes = type(method).observe is not Method.observe
        decodes = type(method).decode is not Method.decode

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.phase == "off" or self.rows is None:  # a call of the projection by the method itself
                return None
            ran.add(layer)
            h = args[0] if args[0].dim() == 3 else self.in_batch(args[0])
            if self.phase == "context":
                if observes:
                    self.rows.sums[layer] = method.add(self.rows.sums[layer], ffn, h, self.valid)
                return None
            if not decodes or self.fast.on:
                return None
            pruned = method.decode(ffn, h, self.rows)
            return None if pruned is h else (pruned.view(args[0].shape), *args[1:])

        return hook

    @torch.no_grad()
    def _end(self, _module: nn.Module, _args: tuple[object, ...], output: object) -> None:
        # From here on nothing is a forward, a re-mask's own projections included.
        phase, self.phase, self._last = self.phase, "off", self.phase
        if fast := self.fast.on:
            self.fast.end()
        if not self._has_cache:
            self._follow(cache_in(output, type(self.model).__name__), self._cached)
        if not fast and len(self._ran) < len(self.ffns):
            missing = [f.layer for f in self.ffns if f.layer not in self._ran]
            raise UserError(
                f"{len(missing)} of {len(self.ffns)} FFNs of {type(self.model).__name__} did not run where prune() "
                f"found them (the first in layer {missing[0]})",
                "change layers, adapters or quantisation before the block begins",
            )
        rows = self.rows
        assert rows is not None
        if phase == "context":
            rows.seen = rows.seen + self.valid.sum(1)
            self.method.finish(rows, self.valid)
            self.fast.copy_rows(self.method.masks(rows))
            return
        if not self.method.exact:
            self.log.steps[-1] = Step(self.method.read(rows, self.valid), self.log.steps[-1].mask)
        ended = None if self.going is self.valid else ~self.going[:, -1]
        self._tally.decode(self.log.steps[-1].read, self.valid.shape[1], ended)
        if not self.frozen and self.method.after(rows, self.going, self.log):
            self._step = None
            self.fast.copy_rows(self.method.masks(rows))

    # -- what it tells ---------------------------------------------------------------------------------------------

    @property
    def prunes(self) -> bool:
        """Whether anything is ever left out."""
        return self.method.prunes

    @property
    def prompts_replaced(self) -> bool:
        """Whether prompts, too, are not those of the model as it is."""
        return self.method.replaces and (self.sparsity > 0 or not self.method.sized)

    def step(self) -> Step:
        """Return the weights that a decoding forward uses now."""
        assert self.rows is not None
        if self._step is None:
            self._step = self._step_of(self.rows)
        return self._step

    def _step_of(self, rows: Rows) -> Step:
        read, mask, dense = self.method.read(rows), self.method.in_mask(rows), self.method.dense_now(rows)
        if dense is not None:
            read, mask = (torch.where(dense.cpu(), 1.0, share) for share in (read, mask))
        return Step(read, mask)

    def masks(self, row: int) -> list[Tensor]:
        """Return the mask in force of one sequence, per layer [pool] bool: all neurons where there is none."""
        masks = self.method.masks(self._rows_or_new())
        if not masks:
            return [torch.ones(f.pool, dtype=torch.bool) for f in self.ffns]
        return [mask[row if len(mask) > 1 else 0] for mask in masks]

    @property
    def execution(self) -> str:
        """The execution of the current sequences: `masked` or `copied`."""
        return "masked" if self.fast.copies is None else "copied"

    @property
    def effective_sparsity(self) -> float:
        """Share of the FFN weight bytes (in the model's own dtype) that generated tokens did not read so far.

        The first token after a context is dense, and counts. Tokens after a sequence's end do not.
        """
        return unread(self._tally.share, 1.0 if self.share is None else self.share)

    @property
    def mask_sparsity(self) -> float:
        """Neurons outside the masks in force, mean over sequences."""
        return float(1 - self._step_of(self._rows_or_new()).mask.mean())

    @property
    def weights_read(self) -> float:
        """FFN weight bytes that a pruned token reads / bytes in the model's own dtype, mean over sequences."""
        fixed = self.method.exact and self.writer is None
        measured = [] if fixed else [step.read for step in self.steps]
        reads = torch.cat(measured or [self.method.read(self._rows_or_new())])
        pruned = reads[reads != 1]  # others ran dense
        return (self.share or 1.0) * float((pruned if len(pruned) else reads).mean())

    def _rows_or_new(self) -> Rows:
        if self.rows is not None:
            return self.rows
        rows = Rows(1, self.ffns, torch.device("cpu"), self.shared_mask)
        self.method.begin(rows)
        return rows

    @property
    def memory(self) -> int:
        """Bytes that lie beside the dense model while one sequence decodes (`cost.memory`)."""
        return cost.memory(self.method, self.ffns, self.fast.available, self.state_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes that each sequence adds: its masks, scores and their factors, ring buffer, detector."""
        return 0 if self.rows is None else nbytes(self.rows) // len(self.rows)

    @property
    def remasks(self) -> list[int]:
        """Re-masks so far, per sequence of the current batch."""
        return [] if self.rows is None else self.rows.remasks.tolist()

    @property
    def steps(self) -> list[Step]:
        """The weights of each decoding forward since the last new context."""
        return self.log.steps

    @property
    def events(self) -> list[Json]:
        """Re-masks since the last new context: step, token, sequence, overlap."""
        return self.log.events

    def trace(self, row: int, tokens: int | None = None) -> Json | None:
        """Return the detector's trace of one sequence since its context: see `Log.trace`. None without a detector."""
        return None if self.rows is None else self.method.trace(self.rows, self.log, row, tokens)


def named_arguments(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _refuse_labels(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """Refuse labels: the loss would be that of a dense prompt, whatever the method."""
    if (named_arguments(module, args, kwargs) if args else kwargs).get("labels") is not None:
        raise UserError(
            "a forward with labels is a prompt, which prune() runs dense: its loss would be the dense model's",
            "measure perplexity with `dart-eval run`, or score tokens one by one through the KV cache",
        )


def _refuse_continuous_batching(*_args: object, **_kwargs: object) -> object:
    raise UserError(
        "continuous batching runs prompts and decoded tokens in one forward, which prune() cannot follow",
        "use generate()",
    )


def _compiled(remedy: str) -> UserError:
    return UserError("a model from torch.compile ignores hooks, which prune() needs", remedy)


@torch.compiler.disable  # the compiler leaves the call as it is, and goes on without what it sees raised
def _refuse_compiled() -> None:
    raise _compiled("call the model itself, and generate() with disable_compile=True")


def _ids(value: object) -> list[int]:
    """Return token ids in any form that `generate` takes: none, one, several, or a tensor of them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _drop_compiled_code() -> None:
    """Let compiled code notice hooks, which by default it ignores: a part compiled before would run dense."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()


# -- what a forward's KV cache and attention mask tell ---------------------------------------------------------------


def real_tokens(mask: object, cache: Cache | None, past: int, batch: int, length: int, device: torch.device) -> Tensor:
    """Return [B, T] bool, the new tokens that are not padding.

    Args:
        mask: the decoder's argument: None, one mask, or one per type of layer.
        cache: the KV cache before the forward, or None.
        past: tokens in the cache.
        batch: B.
        length: T.
        device: of the result.

    Raises:
        UserError: the mask has a form that does not show padding.
    """
    kind = None
    if isinstance(mask, dict):
        # A missing mask is a plain causal one, which a padded batch never has.
        kind = next((k for k in ("full_attention", *mask) if mask.get(k) is not None), None)
        mask = None if kind is None else mask[kind]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not hasattr(mask, "shape") or len(mask.shape) not in (2, 4):
        raise UserError(
            f"an attention mask of type {type(mask).__name__} does not tell prune() what is padding", MASK_REMEDY
        )
    width = int(mask.shape[-1])
    start = past - _offset(cache, width, length, kind)
    if start < 0 or start + length > width:
        raise UserError(
            f"the attention mask has {width} columns, and the forward has {length} tokens after {past} cached ones",
            MASK_REMEDY,
        )
    return _own_entries(mask, start, length).to(device).expand(batch, length)


def _offset(cache: Cache | None, width: int, length: int, kind: str | None) -> int:
    """Return the position of a mask's first column: caches of sliding windows drop the oldest tokens."""
    for layer in sorted(getattr(cache, "layers", ()), key=lambda layer: bool(getattr(layer, "is_sliding", False))):
        if kind is not None and getattr(layer, "is_sliding", False) == (kind == "full_attention"):
            continue
        if hasattr(layer, "get_mask_sizes"):
            columns, offset = layer.get_mask_sizes(length)
            if columns == width:
                return int(offset)
    return 0


def _own_entries(mask: Any, start: int, length: int) -> Tensor:
    """Return [B or 1, T] bool, whether each new token attends to itself; its key is in column start + t."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, start : start + length] > 0
    if not isinstance(mask, Tensor):  # flex attention: a function of batch, head, query and key
        rows = torch.arange(mask.shape[0], device=mask.kv_num_blocks.device)[:, None]
        queries = torch.arange(length, device=rows.device)[None]
        return mask.mask_mod(rows, torch.zeros_like(rows), queries, queries + start).expand(mask.shape[0], length)
    own = mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def cache_in(output: object, model: str) -> Cache:
    """Return the KV cache in the output of a forward. model: its class, for the message.

    Raises:
        UserError: there is none.
    """
    values = output if isinstance(output, (tuple, list)) else vars(output).values()
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    if cache is None:
        raise UserError(
            f"{model} gave no KV cache: under prune() each forward would be a new prompt",
            "leave use_cache on and gradient checkpointing off; prune() needs a model with a KV cache",
        )
    return cache


def check_cache(cache: Cache | None, use_cache: bool | None) -> None:
    """Refuse a forward without KV cache, or with one whose length is unknown.

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
