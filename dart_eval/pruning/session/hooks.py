"""The hooks of a session on its model: they pass activations to the sequences' state, and prune.

They last as long as the session; hooks inside FFNs last as long as forwards need them. A compiler traces only the hooks
whose tensors keep their addresses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dart_eval.layers import experts, verify
from dart_eval.layers.families import decoder
from dart_eval.layers.ffn import FFN
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.session.state import SequenceState
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.pruning.method import Beside

Phase = Literal["off", "context", "decode"]


@dataclass
class Forward:
    """The current forward.

    Attributes:
        phase: `off` between forwards.
        last: phase of the forward before.
        turn: the call of `generate` that it belongs to.
        state: of its sequences; None if they run dense.
        valid: [B, T] bool, False for padding.
        going: likewise, and False for sequences that ended before.
        has_cache: whether it was called with a KV cache.
        frozen: whether nothing is observed.
        watching: whether every layer passes on its h.
        seen: layers that have passed on their h.
        attention: [B, T, D] attention output of the last layer, once it has run.
        residual, gate, up: of the current layer: the stream that enters it, act(gate x) and up x.
    """

    phase: Phase = "off"
    last: Phase = "off"
    turn: int = 0
    state: SequenceState | None = None
    valid: Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))
    going: Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))
    has_cache: bool = True
    frozen: bool = False
    watching: bool = False
    seen: set[int] = field(default_factory=set)
    attention: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None

    def in_batch(self, x: Tensor) -> Tensor:
        """Return [B, T, ...] of a layer's tensor, which may be [B * T, ...] (OPT)."""
        return x if x.dim() == 3 else x.view(*self.valid.shape, x.shape[-1])


class Hooks:
    """Installs and removes the hooks that a method needs."""

    def __init__(
        self, model: nn.Module, ffns: Sequence[FFN], method: Pruner, forward: Forward, beside: Beside | None = None
    ) -> None:
        self.model, self.ffns, self.method, self.forward, self.beside = model, ffns, method, forward, beside
        self.decoder = decoder(model)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._inside: list[torch.utils.hooks.RemovableHandle] = []
        self._experts: list[tuple[Any, str, object]] = []

    def install(self, begin: Callable[..., None], end: Callable[..., None]) -> None:
        """Watch the model. begin, end: run before and after each forward of its decoder."""
        _guard_hooks()
        self._experts = experts.take_over(self.model) if any(f.routed for f in self.ffns) else []
        add, ffns, method = self._handles.append, self.ffns, self.method
        add(self.model.register_forward_pre_hook(_no_labels, with_kwargs=True))
        add(self.decoder.register_forward_pre_hook(_eager(begin), with_kwargs=True))
        add(self.decoder.register_forward_hook(_eager(end)))
        for ffn in ffns:
            if method.mask.remask.needs_ring:
                add(ffn.block.register_forward_pre_hook(self._on_input(ffn.layer)))
            if method.compensation.adds:
                add(ffn.down.register_forward_hook(self._on_down(ffn.layer)))
        if method.mask.remask.watches:
            add(ffns[-1].attention.register_forward_hook(self._on_attention))
        self.watch_ffns(True)

    def watch_ffns(self, wanted: bool) -> None:
        """Install or remove the hooks inside FFNs, which are not needed if copies already apply the mask."""
        if wanted == bool(self._inside):
            return
        _drop(self._inside)
        if not wanted:
            return
        add, method = self._inside.append, self.method
        if self.beside is not None:
            self.beside.watch(add, self.forward)
        for ffn in self.ffns:
            add(ffn.into.register_forward_pre_hook(_eager(self._on_hidden(ffn.layer))))
            if method.allocation.needs_change:
                self._watch_change(ffn)
            if method.choice.chooses and ffn.gated:  # a plain FFN chooses by h, without hooks on gate and up
                add(ffn.up.register_forward_hook(self._on_product(ffn, *["gate"] * ffn.fused, "up")))
                if isinstance(ffn.act, nn.Module):
                    add(ffn.act.register_forward_hook(self._on_product(ffn, "act")))
                elif ffn.gate is not None:
                    add(ffn.gate.register_forward_hook(self._on_product(ffn, "gate")))

    def _watch_change(self, ffn: FFN) -> None:
        """Install the hooks on an FFN's input stream and output; FFNs of one layer count together."""
        add = self._inside.append
        if not ffn.joint:
            add(ffn.residual.register_forward_pre_hook(_eager(self._on_residual)))
            alone = self._on_change([ffn.layer], lambda output, _stream: output * ffn.scale)
            add(ffn.output.register_forward_hook(_eager(lambda _module, _args, output: alone(output))))
            return
        together = [f for f in self.ffns if f.holder is ffn.holder]
        if ffn is together[0]:
            add(ffn.residual.register_forward_pre_hook(_eager(self._on_copied_residual)))
            observe, layer = self._on_change([f.layer for f in together], torch.sub), ffn.holder
            if ffn.after is None:
                add(layer.register_forward_hook(_eager(lambda _m, _args, out: observe(verify.unscaled(layer, out)))))
            else:
                add(ffn.after.register_forward_pre_hook(_eager(lambda _module, args: observe(args[0]))))

    def remove(self) -> None:
        """Remove all hooks."""
        _guard_hooks()
        self.watch_ffns(False)
        _drop(self._handles)
        if self._experts:
            experts.give_back(self._experts)
            self._experts = []

    def check_ran(self) -> None:
        """Check that every layer's FFN ran where it was found.

        Raises:
            UserError: one did not.
        """
        missing = [f.layer for f in self.ffns if f.layer not in self.forward.seen]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.ffns)} FFNs of {type(self.model).__name__} did not run where prune() "
                f"found them (the first in layer {missing[0]})",
                "change layers, adapters or quantisation before the block begins",
            )

    # -- what they do ----------------------------------------------------------------------------------------

    def _on_hidden(self, layer: int) -> Callable[..., object]:
        forward = self.forward

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if forward.phase == "off":  # a call of the projection by the state itself
                return None
            h, state = forward.in_batch(args[0]), forward.state
            forward.seen.add(layer)
            gate, up, forward.gate, forward.up = forward.gate, forward.up, None, None
            if state is None:
                return None
            if forward.phase == "context":
                state.observe(layer, h, forward.valid)
                return None
            masked = state.prune(layer, h, forward.going, gate, up)
            return None if masked is h else (masked.view(args[0].shape), *args[1:])

        return hook

    def _on_down(self, layer: int) -> Callable[..., Tensor | None]:
        forward = self.forward

        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> Tensor | None:
            if forward.phase != "decode" or forward.state is None or not forward.state.prunes:
                return None
            constant = forward.state.layers[layer].fitted.constant
            assert constant is not None
            return (forward.in_batch(output) + constant.to(output.device, output.dtype)).view(output.shape)

        return hook

    def _on_input(self, layer: int) -> Callable[..., None]:
        forward = self.forward

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            state = forward.state
            if forward.phase != "off" and state is not None and state.remasking is not None and not forward.frozen:
                state.remasking.observe_input(layer, forward.in_batch(args[0]), forward.going)

        return hook

    def _on_change(self, layers: Sequence[int], added: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], None]:
        """Return the observer of an output of a decoder layer. added: by its FFNs, from this and the stream before."""
        forward = self.forward

        def observe(output: Tensor) -> None:
            before, forward.residual = forward.residual, None
            if forward.phase == "context" and forward.state is not None and before is not None:
                change = added(forward.in_batch(output), before)
                for layer in layers:
                    forward.state.observe_change(layer, before, change, forward.valid)

        return observe

    def _on_residual(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        forward = self.forward
        if forward.phase == "context":
            forward.residual = forward.in_batch(args[0])

    def _on_copied_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.forward.phase == "context":
            self._on_residual(module, (args[0].clone(),))  # a model may add to it in place before it leaves the layer

    def _on_product(self, ffn: FFN, *given: str) -> Callable[..., object]:
        """Return the hook of a module that gives these in equal parts: `gate` x, `act`(gate x), `up` x."""
        forward = self.forward

        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> None:
            if forward.phase != "decode":
                return
            for name, part in zip(given, forward.in_batch(output).chunk(len(given), dim=-1), strict=True):
                if name == "up":
                    forward.up = ffn.lifted(part)
                elif name == "act":
                    forward.gate = part
                elif not isinstance(ffn.act, nn.Module):  # a function has no hooks: it runs a second time
                    forward.gate = ffn.act(part)

        return _eager(hook)

    def _on_attention(self, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        forward, output = self.forward, output[0] if isinstance(output, tuple) else output
        state = forward.state
        if state is None:
            return
        if forward.phase == "context":
            state.observe_attention(output, forward.valid)
        else:
            forward.attention = output


def _drop(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()
    handles.clear()


def named_arguments(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Any]:
    """Return all arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _no_labels(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Refuse labels: the loss would be that of a dense prompt, whatever the method."""
    if named_arguments(module, args, kwargs).get("labels") is not None:
        raise UserError(
            "a forward with labels is a prompt, which prune() runs dense: its loss would be the dense model's",
            "measure perplexity with `dart-eval run`, or score tokens one by one through the KV cache",
        )


def _guard_hooks() -> None:
    """Make compiled code notice hooks.

    By default torch's compiler ignores them: a model compiled before `prune()` would run dense, without its hooks, and
    one compiled inside would keep them afterwards. If a compiler is in use, drop its code once; from then on it checks.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()


def _eager(hook: Callable[..., object]) -> Callable[..., object]:
    """Hide a hook from the compiler, since it acts differently from forward to forward."""
    return torch.compiler.disable(hook)
