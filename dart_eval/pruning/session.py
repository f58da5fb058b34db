"""`prune()`: attach a method to a model, run, detach. The life of one forward:

    begin (pre-hook of the decoder)  which phase is this, which tokens are real
    each layer                       context: observe h and the stream;  decode: multiply h by the mask
    end (hook of the decoder)        context: make masks;  decode: ask the detector, renew masks

Two executions of the same masks. `masked`: 0/1 factors on the input of the down projection, so any batch runs, every
sequence with its own mask; no time saved. `permuted`: the kept neurons moved to the front of the weights and nothing
else multiplied (`permuted.py`); one mask at a time. Masks change only in `end`, never inside a forward, and outside of
decoding forwards the weights are whole.

Phases are told by the KV cache: an empty cache starts new sequences; one token on a filled cache is decoding; more
tokens on a filled cache extend the context (chunked prefill, a further turn): they run dense, are observed, and the
masks are made anew. Under `generate`, whose prompt is known, so does a single token of the prompt. A cache that lost
tokens since the last forward (assisted decoding, a turn rolled back) is refused: what was observed cannot be taken
back. The evaluation sets phases itself with `context()` and `decode()`.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dart_eval.allocation import check_table, keep_counts
from dart_eval.errors import UserError, nearest
from dart_eval.ffn import FFN, check_depth, find_ffns, is_conv1d, unchanged
from dart_eval.pruning import gather
from dart_eval.pruning.cache_watch import CacheWatch, check_cache
from dart_eval.pruning.calibration import TextCalibration
from dart_eval.pruning.calls import Calls, refuse_second
from dart_eval.pruning.hooks import Forward, Hooks, Phase
from dart_eval.pruning.inplace import to_the_end
from dart_eval.pruning.masks import top_k_mask
from dart_eval.pruning.method import Calibration, Method, PromptMethod, StaticMethod
from dart_eval.pruning.padding import real_tokens
from dart_eval.pruning.permuted import REORDERED, PermutedFFNs, quantised, shared
from dart_eval.pruning.registry import make
from dart_eval.pruning.state import SequenceState
from dart_eval.pruning.tally import Tally

Execution = Literal["auto", "masked", "permuted"]
EXECUTIONS = ("auto", "masked", "permuted")


@dataclass(frozen=True)
class Step:
    """A decoding forward under a mask. read: [B] FFN weights read / all of them. mask: [B] neurons in the mask / all.

    Both are fp64 on the CPU; they are equal but for methods whose tokens pick inside the mask.
    """

    read: Tensor
    mask: Tensor


class Session:
    """One method on one model. Made by `prune`; see there."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        sparsity: float,
        calibration: Calibration | None = None,
        execution: Execution = "auto",
        shared_mask: bool = False,
    ) -> None:
        self.model, self.method = model, method
        self.sparsity = sparsity if method.prunes else 0.0
        self.ffns = find_ffns(model)
        if method.layer_allocation == "depth":
            check_depth(model, self.ffns)
        self.shared_mask = shared_mask
        self._wanted = self._possible(execution)
        self.permuted: PermutedFFNs | None = None  # while the neurons are in an order of ours
        self._step: Step | None = None  # what decoding forwards use, while nothing has changed it
        # Whether h is looked at in every token, whatever the mask.
        self._choosy = isinstance(method, PromptMethod) and (method.stages > 1 or method.renewal.dense_tokens > 0)
        self.state: SequenceState | None = None
        self.steps: list[Step] = []  # one per decoding forward since the last new context
        self.events: list[dict[str, Any]] = []  # re-masks since then: step, token, sequence, cause, overlap
        self.alarms: list[dict[str, Any]] = []  # of the detector since then: token, sequence
        self.signals: list[Tensor] = []  # [B] per detector window since then; NaN where a sequence had ended
        self.decoded = 0  # tokens per sequence since then
        self.static_masks: list[Tensor] | None = None  # L x [1, F] bool
        self._weights: list[Tensor] | None = None  # L x [F], a prompt method's factors on the energies
        if isinstance(method, StaticMethod):
            self.static_masks = self._make_static_masks(method, calibration)
        if isinstance(method, PromptMethod):
            if calibration is not None:
                self._weights = method.neuron_weights(calibration)
            if method.table is not None:
                check_table(method.table, sparsity, len(self.ffns))
        self._forced: Phase | None = None
        self._given_valid: Tensor | None = None
        self._tally = Tally()
        self.forward = Forward()
        self._cache = CacheWatch(self._follow_beams if isinstance(method, PromptMethod) else None)
        self._calls = Calls(model)
        self._hooks = Hooks(self)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned; the model runs as it is otherwise."""
        return self.method.prunes

    @property
    def looks_ahead(self) -> bool:
        """Whether masks are made from the tokens that they are used on (an oracle)."""
        return isinstance(self.method, PromptMethod) and self.method.looks_ahead

    # -- what the user reads ---------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """How the sequences under way are decoded: `masked` or `permuted`."""
        return "masked" if self.permuted is None else "permuted"

    @property
    def effective_sparsity(self) -> float:
        """Share of the FFN weights that the tokens generated so far did not read, dense tokens included.

        Each context's last position makes a token, densely. What a batch computes for a sequence after its end is left
        out, where `generate` runs it.
        """
        return self._tally.share

    @property
    def mask_sparsity(self) -> float:
        """Neurons outside the masks in force, mean over sequences."""
        return float(1 - self.shares(1).mask.mean())

    @property
    def weights_read(self) -> float:
        """FFN weights that a decoded token multiplies / all FFN weights, mean over sequences."""
        return float(self.shares(1).read.mean())

    @property
    def state_bytes(self) -> int:
        """Bytes the method keeps beside the model: masks, scores and their factors, ring buffer, detector."""
        own = sum(m.numel() * m.element_size() for m in [*(self.static_masks or []), *(self._weights or [])])
        return own + (self.state.nbytes() if self.state else 0)

    @property
    def remasks(self) -> list[int]:
        """Re-masks so far, per sequence of the current batch."""
        return self.state.remasks.tolist() if self.state else []

    def shares(self, batch: int) -> Step:
        """What a decoding forward would use now."""
        if self.static_masks is not None:
            kept = sum(int(m.sum()) for m in self.static_masks) / sum(f.size for f in self.ffns)
            share = torch.full((batch,), kept, dtype=torch.float64)
            return Step(share, share)
        if self.state is not None and self.state.masks is not None:
            return Step(self.state.weights_read(), self.state.mask_share())
        everything = torch.ones(batch, dtype=torch.float64)
        return Step(everything, everything)

    # -- what the evaluation calls ---------------------------------------------------------------------------

    @contextmanager
    def context(self, valid: Tensor) -> Iterator[None]:
        """The forward inside is the dense context of new sequences. valid: [B, T] bool, False for padding."""
        self.state = None
        with self._force("context", valid):
            yield

    @contextmanager
    def extend(self, new: Tensor) -> Iterator[None]:
        """The forward inside goes on with the dense contexts of the sequences in `state` (see `fork`).

        new: [B, T] bool, the tokens that the state has not seen; the forward may compute others again.
        """
        with self._force("context", new):
            yield

    @contextmanager
    def decode(self, valid: Tensor, frozen: bool = False) -> Iterator[None]:
        """The forward inside runs pruned under the masks in force. valid: [B, T] bool.

        T <= `room()`, unless the masks are `frozen`: then nothing is observed and nothing renewed.
        """
        self.forward.frozen = frozen
        try:
            with self._force("decode", valid):
                yield
        finally:
            self.forward.frozen = False

    @contextmanager
    def foresee(self, valid: Tensor) -> Iterator[None]:
        """The forward inside is a dense rehearsal: the masks are made from its tokens alone. valid: [B, T] bool."""
        if self.state is not None:
            self.state.forget()
        with self._force("context", valid):
            yield

    def no_context(self, batch: int, device: torch.device) -> None:
        """Begin new sequences that have no context: prompt methods run them dense."""
        self.state = self._step = None
        if isinstance(self.method, PromptMethod):
            self.state = self._new_state(batch, device)
            self.state.skip_context()

    def _new_state(self, batch: int, device: torch.device) -> SequenceState:
        assert isinstance(self.method, PromptMethod)
        return SequenceState(self.ffns, self.method, self.sparsity, batch, device, self._weights, self.shared_mask)

    def room(self) -> int | None:
        """Tokens that may run in one decoding forward before the masks may change; None for any number."""
        return self.state.room() if self.state else None

    def fork(self, state: SequenceState | None, rows: Tensor) -> None:
        """Continue from `state` (earlier `session.state`) with its sequences `rows`, repeats allowed."""
        self._step = None
        self.state = state.select(rows) if state is not None else None
        self._new_log()

    def trace(self, row: int, tokens: int | None = None) -> dict[str, Any] | None:
        """What the detector saw of one sequence since its context, or None where no window was full.

        Args:
            tokens: leave out what came after this many tokens that ran pruned.

        Returns:
            `window` (tokens); `threshold` (None where the prompt had no full window); `signal` (cosines, one per full
            window); `mean` and `deviation` of the prompt's windows, where there were any; `alarms` (decoded tokens
            before each) and `remasks` (before each new mask that followed one).
        """
        detector = self.state.detector if self.state else None
        if detector is None:
            return None
        window = detector.config.window
        last = len(self.signals) if tokens is None else min(len(self.signals), tokens // window)
        signal = [value for s in self.signals[:last] if not math.isnan(value := float(s[row]))]
        if not signal:
            return None

        def those(events: list[dict[str, Any]]) -> list[int]:
            mine = [e["token"] for e in events if e["sequence"] == row and e.get("cause") != "steady"]
            return [token for token in mine if tokens is None or token <= tokens]

        threshold = float(detector.threshold[row])
        found = {
            "window": window, "threshold": threshold if math.isfinite(threshold) else None, "signal": signal,
            "alarms": those(self.alarms), "remasks": those(self.events),
        }  # fmt: skip
        for name in ("mean", "deviation"):
            value = float(getattr(detector, name)[row])
            if not math.isnan(value):
                found[name] = value
        return found

    def _new_log(self) -> None:
        self.steps, self.events, self.alarms, self.signals, self.decoded = [], [], [], [], 0

    @contextmanager
    def _force(self, phase: Phase, valid: Tensor) -> Iterator[None]:
        self._forced, self._given_valid = phase, valid
        try:
            yield
        finally:
            self._forced, self._given_valid = None, None

    # -- execution -------------------------------------------------------------------------------------------

    def _possible(self, execution: Execution) -> Execution:
        """The execution that this model allows. Quantised weights fall back to masks, with a warning.

        Raises:
            UserError: no such execution, or weights that cannot be reordered because other modules use them too.
        """
        if execution not in EXECUTIONS:
            raise UserError(f"unknown execution {execution!r}", nearest(execution, EXECUTIONS))
        if execution == "masked" or not self.method.prunes:
            return execution
        reason = quantised(self.ffns)
        if reason is None and (reason := shared(self.ffns, self.model)) and execution == "permuted":
            raise UserError(reason, "use execution='masked'")
        if reason is not None:
            warnings.warn(f"{reason}: pruning by masks, which saves no time", stacklevel=4)
            return "masked"
        return execution

    @property
    def _can_gather(self) -> bool:
        """Whether a token's choice can save time: of gated FFNs, on a CPU or by Triton's kernels."""
        method = self.method
        return (
            isinstance(method, PromptMethod)
            and method.stages > 1
            and not method.renewal.dense_tokens
            and all(f.gate is not None and not is_conv1d(f.down) for f in self.ffns)
            and all(_device_of(f).type == "cpu" or gather.missing(_device_of(f)) is None for f in self.ffns)
        )

    def _choose_execution(self, batch: int) -> None:
        """For new sequences: reorder the neurons, or put them back."""
        if self.permuted is None and any(f.order is not None for f in self.ffns):
            raise UserError(REORDERED, "leave that one first")
        one = batch == 1 or self.shared_mask or self.static_masks is not None
        if self._wanted == "permuted" and not one:
            raise UserError(
                f"permuted execution runs one mask at a time, and this batch has {batch} sequences",
                "use shared_mask=True (one mask for all of them), execution='masked', or one sequence",
            )
        # What sets phases itself may take any sequence up again, with another mask.
        if self._wanted != "masked" and one and self._forced is None:
            if self.permuted is not None and self.permuted.gathered and batch > 1:
                self._restore()  # which is for one sequence
            if self.permuted is None:
                self.permuted = PermutedFFNs(self.ffns, self.model, self._can_gather and batch == 1)
                self.permuted.begin()  # from here on `detach` undoes it
                self._move_kept(self.static_masks)
        else:
            self._restore()

    def _move_kept(self, masks: Sequence[Tensor] | None) -> None:
        """Kept neurons to the front, if they are not there. masks: L x [B, F], the same for all sequences."""
        permuted, state = self.permuted, self.state
        if permuted is None:
            return
        for layer, mask in enumerate(masks or ()):
            permuted.select(layer, mask[0])
        if permuted.gathered and state is not None:
            for layer, gathered in enumerate(permuted.gathered):
                gathered.prepare(*state.choice(layer, permuted.kept[layer]))

    def _restore(self) -> None:
        permuted = self.permuted
        if permuted is not None:
            permuted.restore()
            self.permuted = None

    # -- one forward -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward, tokens = self.forward, kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0]
        batch, length = tokens.shape[:2]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self._check(module, cache, kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        forward.kept = cache is not None
        self._set_phase(cache, past, length)
        if self._given_valid is None:
            mask = kwargs.get("attention_mask")
            forward.valid = real_tokens(mask, cache, past, batch, length, tokens.device)
        else:
            forward.valid = self._given_valid
        chunk = bool(past) and forward.last == "context" and forward.turn == self._calls.turn
        forward.turn = self._calls.turn
        if not past:
            self._new_log()
        if self.permuted is not None:
            self.permuted.whole()  # an exception may have left it sliced
            forward.sliced = False
        if not past and self._forced is None and not unchanged(self.model, self.ffns):
            raise UserError(
                f"layers of {type(self.model).__name__} have changed inside prune()",
                "inject adapters, drop layers or quantise before the block begins",
            )
        if not past or self._forced is not None or (self.state is None and self.static_masks is None):
            self._choose_execution(batch)
        if self.state is not None and self.state.batch != batch:
            raise UserError(
                f"the batch changed from {self.state.batch} to {batch} sequences while decoding under prune()",
                "masks are per sequence: use greedy search or sampling (num_beams=1), with one cache per batch",
            )
        if isinstance(self.method, PromptMethod) and self.state is None:
            self.state = self._new_state(batch, tokens.device)
            if forward.phase == "decode":  # the cache was filled before the session began: observe from here
                forward.phase = "context"
        if forward.phase == "decode":
            self._begin_decode(tokens, batch, length)
        else:
            self._step = None
            if self._forced is None:
                self._tally.context(batch, chunk)
        forward.seen.clear()
        gathers = self.permuted is not None and bool(self.permuted.gathered)
        forward.looking = not forward.sliced or (self._choosy and not gathers)
        self._hooks.look_inside(forward.looking)
        if forward.phase == "context" and kwargs.get("logits_to_keep"):
            # Layers that share keys and values would compute the last tokens alone (Gemma 4): masks are made from all.
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _check(self, module: nn.Module, cache: Any, kwargs: dict[str, Any]) -> None:
        """Refuse forwards that a session cannot follow."""
        if module is not self._hooks.decoder:
            raise UserError("this is a copy of a model under prune()", "make copies before the block, or after it")
        check_cache(cache, kwargs.get("use_cache"))
        if self._forced is None and self.looks_ahead:
            raise UserError(
                f"{self.method.name} looks ahead at the text to be scored, which a forward called by hand lacks",
                "use it with `dart-eval run` on tasks that score answers",
            )

    def _set_phase(self, cache: Any, past: int, length: int) -> None:
        if self._forced is not None:
            self.forward.phase = self._forced
            return
        self._cache.check(cache, past, self.state is not None)
        self._cache.follow(cache, past + length)
        decodes = past and length == 1 and past >= self._calls.prompt
        self.forward.phase = "decode" if decodes else "context"
        if not past:
            self.state = None

    def _begin_decode(self, tokens: Tensor, batch: int, length: int) -> None:
        if self._step is None:
            self._step = self.shares(batch)
        step = self._step
        self.steps.append(step)
        self.decoded += length
        ended = None
        if self._forced is None and batch > 1 and self._calls.ends and not tokens.is_floating_point():
            ended = torch.isin(tokens[:, -1], torch.tensor(sorted(self._calls.ends), device=tokens.device))
        self._tally.decode(step.read, length, ended)
        if self.permuted is not None and bool((step.mask < 1).all()):
            self.permuted.slice()
            self.forward.sliced = True

    def _follow_beams(self, beams: Tensor) -> None:
        if self._hooks.installed and self.state is not None:
            self._step = None
            self.state = self.state.select(beams.to(self.state.device))

    @torch.no_grad()
    def _end(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        forward = self.forward
        attention, forward.attention = forward.attention, None
        # What runs from here on, a re-mask's own projections too, is no forward.
        phase, forward.phase = forward.phase, "off"
        forward.last = phase
        if forward.sliced and self.permuted is not None:
            self.permuted.whole()
            forward.sliced = False
        if not forward.kept:
            self._cache.take(output, type(self.model).__name__)
        if forward.looking and (self.state is not None or phase == "decode"):
            self._check_seen(forward.seen)
        if self.state is None:
            return
        if phase == "context":
            self.state.finish_context(forward.valid)
            self._move_kept(self.state.masks)
        elif self.state.masks is not None and not forward.frozen:
            detector = self.state.detector
            watching = detector is not None and attention is not None
            changes = self.state.finish_decode(attention if watching else None, forward.valid)
            if watching and detector is not None and detector.position == 0:
                self.signals.append(detector.signal.cpu())
            if watching:
                for row in self.state.alarms.nonzero().flatten().tolist():
                    self.alarms.append({"token": self.decoded, "sequence": row})
            if changes or self.state.method.renewal.dense_tokens:
                self._step = None
            if changes:
                self._move_kept(self.state.masks)
            for change in changes:
                self.events.append({
                    "step": len(self.steps), "token": self.decoded, "sequence": change.sequence,
                    "cause": change.cause, "overlap": change.overlap,
                })  # fmt: skip

    def _check_seen(self, seen: set[int]) -> None:
        """Whether every layer's FFN ran where it was found."""
        missing = [f.layer for f in self.ffns if f.layer not in seen]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.ffns)} FFNs of {type(self.model).__name__} did not run where prune() "
                f"found them (the first in layer {missing[0]})",
                "change layers, adapters or quantisation before the block begins",
            )

    # -- attach and detach -----------------------------------------------------------------------------------

    def attach(self) -> None:
        """Install the hooks the method needs."""
        if self.method.prunes:
            self._calls.watch()
            self._hooks.install(self._begin, self._end)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are the model's own: dense, unobserved, without a hook."""
        self._hooks.remove()
        try:
            yield
        finally:
            self._hooks.install(self._begin, self._end)

    @contextmanager
    def sliced(self) -> Iterator[None]:
        """Forwards inside multiply the kept neurons of the permuted weights, whatever they are."""
        assert self.permuted is not None
        self.permuted.slice()
        try:
            yield
        finally:
            self.permuted.whole()

    def detach(self) -> None:
        """Remove every hook, and put every neuron back; an interrupt meanwhile is raised at the end."""
        try:
            to_the_end(self._leave)
        finally:
            to_the_end(self._leave)

    def _leave(self) -> None:
        try:
            self._hooks.remove()
            self._calls.release()
            self._cache.leave()
        finally:
            self._restore()

    def _make_static_masks(self, method: StaticMethod, calibration: Calibration | None) -> list[Tensor]:
        if calibration is None:
            raise UserError(f"method {method.name} needs a calibration", "pass tokenizer= to prune()")
        scores = method.static_scores(calibration)
        sizes = [f.size for f in self.ffns]
        keep = keep_counts([1 - self.sparsity] * len(sizes), sizes, self.sparsity)
        return [
            top_k_mask(s[None], torch.tensor([k])).to(_device_of(ffn))
            for s, k, ffn in zip(scores, keep, self.ffns, strict=True)
        ]


def _device_of(ffn: FFN) -> torch.device:
    return next(ffn.down.parameters()).device


def check_sparsity(sparsity: float) -> float:
    """The sparsity, if it is a number in [0, 1).

    Raises:
        UserError: it is not.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise UserError(f"sparsity {sparsity!r} is not a number", "for example 0.5")
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} is outside [0, 1)",
            "it is the pruned fraction: write 0.7 for 70 %, below 1",
        )
    return sparsity


@contextmanager
def prune(
    model: nn.Module,
    method: str | Method = "dart",
    sparsity: float = 0.5,
    *,
    tokenizer: Any = None,
    calibration: Calibration | str | Path | None = None,
    execution: Execution = "auto",
    shared_mask: bool = False,
    **params: Any,
) -> Iterator[Session]:
    """Prune the FFN neurons of `model` while the block runs; the model leaves it as it came.

    The prompt (prefill) runs dense, every decoded token pruned:

        with prune(model, "dart", sparsity=0.7) as session:
            model.generate(**inputs)
        session.effective_sparsity, session.remasks, session.state_bytes

    Args:
        model: a Hugging Face causal language model with a gated or plain FFN.
        method: a name from `dart_eval.methods()`, or a `Method`.
        sparsity: fraction of all FFN neurons to prune, in [0, 1).
        tokenizer: needed by static methods that calibrate on text (`wanda-sp`).
        calibration: a text file for them instead of the project's own text, or a ready `Calibration`.
        execution: `masked` multiplies by masks and saves no time; `permuted` reorders the neurons in place, so that
            pruned ones are not computed, for one mask at a time; `auto` takes `permuted` for one sequence (and for any
            batch where all have one mask), else `masked`.
        shared_mask: all sequences of a batch have one mask, made from and renewed for all of them.
        params: the method's parameters, e.g. `allocation="uniform"`.

    Yields:
        The `Session`, which tells effective sparsity, state bytes and re-masks.

    Raises:
        UserError: unknown method or parameter, sparsity outside [0, 1), an FFN that is not understood or does not suit
            the allocation, weights that `permuted` cannot reorder.
    """
    check_sparsity(sparsity)
    refuse_second(model)
    if isinstance(method, Method):
        if params:
            raise UserError("parameters go into the Method object, not beside it")
    else:
        method = make(method, params)
    if not isinstance(calibration, Calibration):
        text = calibration
        calibration = TextCalibration(model, tokenizer, text)
    session = Session(model, method, sparsity, calibration, execution, shared_mask)
    try:
        try:
            session.attach()
            yield session
        finally:
            session.detach()
    finally:  # an interrupt may have come before the first one began
        session.detach()
