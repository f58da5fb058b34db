"""The trial forward: compares what a model's FFNs compute with their descriptions (`ffn.FFN`).

In a first forward of some tokens, each FFN must feed its down projection the described h; `FFN.adds` notes whether the
stream that leaves an FFN is the entering one plus the FFN's output. In a second forward all neurons are zero, and the
FFN's output must be the same for every token. Otherwise something computes beside the known neurons (experts), and only
a part of the FFN would be pruned. If a layer has several FFNs, perhaps weighed by gates, the second forward shows
whether they add to the stream: it then leaves the layer unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dart_eval.layers import experts
from dart_eval.layers.families import STREAMS
from dart_eval.layers.ffn import FFN
from dart_eval.layers.finite import refuse_not_finite
from dart_eval.layers.projection import input_device
from dart_eval.util.errors import UserError, out_of_memory, summary

TOKENS = 3
TOLERANCE = 0.02  # of the largest value: models compute in bfloat16, or on quantised weights
CONSTANT = 1e-3  # the same for values that must be equal from token to token


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside; afterwards restore the mode of every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Explain in one line an error of the model's own code in the trial forward inside.

    Raises:
        UserError: with the model's name and the error.
    """
    try:
        yield
    except Exception as error:  # it may be anybody's code
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(
            f"{type(model).__name__} fails on a trial forward of {TOKENS} tokens ({summary(error)})",
            "a model must run in transformers before it can be pruned",
        ) from error


@dataclass
class _Seen:
    """The activations of one layer, float32 on the CPU, [T, ...]; None if it did not run.

    Attributes:
        x: input of the FFN.
        h: input of its down projection.
        y: the stream that enters it.
        z: its output, without its scale.
        attention: output of the attention.
        after: the stream that leaves it.
        mixture: output of all experts together.
        others: modules with weights that ran beside the attention and the projections.
        eps: of the dtype of the computation.
        runs: times that it computed h.
    """

    x: Tensor | None = None
    h: Tensor | None = None
    y: Tensor | None = None
    z: Tensor | None = None
    attention: Tensor | None = None
    after: Tensor | None = None
    mixture: Tensor | None = None
    eps: float = 0.0
    runs: int = 0
    others: set[str] = field(default_factory=set)

    def record(self, name: str, value: Tensor | Sequence[Tensor]) -> None:
        value = value if isinstance(value, Tensor) else value[0]
        self.runs += name == "h"
        if name == "y":
            self.eps = torch.finfo(value.dtype).eps
        # h is recomputed from x, which therefore keeps its dtype and device.
        setattr(self, name, value.detach() if name in ("x", "h") else _rows(value))


def verify(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Compare each description with the model's computation.

    Raises:
        UserError: the model fails on a few tokens, or an FFN computes something else or not all of its output.
    """
    name = type(model).__name__
    with torch.no_grad(), evaluating(model):
        _check_experts(model)
        seen = _run(model, ffns, zero=False)
        for f, s in zip(ffns, seen, strict=True):
            _check_hidden(name, f, s)
            f.adds, f.runs = _adds(f, s), s.runs
        for f, s, empty in zip(ffns, seen, _run(model, ffns, zero=True), strict=True):
            _check_alone(name, f, s, empty)
            f.adds = _passes(empty) if f.joint else f.adds


def _check_experts(model: nn.Module) -> None:
    """Check that our two steps compute what each module of experts computes.

    Raises:
        UserError: they do not.
    """
    routed = [m for m in model.modules() if experts.is_routed(m)]
    with ExitStack() as stack:
        for module in routed:
            stack.enter_context(module.register_forward_hook(_same, with_kwargs=True))
        if routed:
            stack.enter_context(experts.taken_over(model, as_written=True))
            _forward(model)


def _same(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor | tuple[Tensor, Tensor]
) -> None:
    theirs, ours = (
        _rows(out[0] if isinstance(out, tuple) else out) for out in (output, experts.ours(module)(*args, **kwargs))
    )
    if not _alike(ours, theirs):
        raise UserError(
            f"{type(module).__name__} computes something else than the experts that would be pruned",
            "take another model",
        )


def _forward(model: Any) -> None:
    """Run a forward of a few tokens."""
    words = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(TOKENS, device=input_device(model)) % words)[None]
    with explaining(model):
        getattr(model, "base_model", model)(input_ids=ids, use_cache=False)


def _run(model: nn.Module, ffns: Sequence[FFN], zero: bool) -> list[_Seen]:
    """Run a few tokens and return the layers' activations. zero: with every neuron at 0."""
    seen = [_Seen() for _ in ffns]
    with ExitStack() as stack, experts.taken_over(model):
        for s, f in zip(seen, ffns, strict=True):
            zeros = [f.into.register_forward_pre_hook(_zeros)] if zero else []
            for handle in [*_watch(s, f, [g for g in ffns if g.holder is f.holder]), *zeros]:
                stack.enter_context(handle)
            if zero and f.routed:
                f.routed.silent = True  # biases differ from expert to expert
                stack.callback(setattr, f.routed, "silent", False)
        _forward(model)
    return seen


def _watch(s: _Seen, f: FFN, together: Sequence[FFN]) -> list[RemovableHandle]:
    """Install hooks that record a layer's activations. together: all its FFNs."""
    layer: Any = f.holder

    def first(name: str) -> Callable[..., None]:
        return lambda _module, args: s.record(name, args[0])

    def output(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: s.record(name, out)

    def stream(_module: nn.Module, _args: object, out: Tensor | Sequence[Tensor]) -> None:
        s.record("after", unscaled(layer, out))

    handles = [
        f.block.register_forward_pre_hook(first("x")), f.into.register_forward_pre_hook(first("h")),
        f.residual.register_forward_pre_hook(first("y")), f.output.register_forward_hook(output("z")),
        f.attention.register_forward_hook(output("attention")),
        f.after.register_forward_pre_hook(first("after")) if f.after else layer.register_forward_hook(stream),
    ]  # fmt: skip
    if (mixture := _mixture(layer)) is not None:
        handles.append(mixture.register_forward_hook(output("mixture")))
    inside = _parts_of(together, layer)
    for name, module in layer.named_modules():
        if id(module) not in inside and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(lambda _m, _args, name=name: s.others.add(name)))
    return handles


def unscaled(layer: object, out: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the stream that leaves a layer, before the layer's factor on it (Gemma 4)."""
    stream = out if isinstance(out, Tensor) else out[0]
    scalar = getattr(layer, "layer_scalar", None)
    return stream if scalar is None else stream / scalar


def _mixture(layer: nn.Module) -> nn.Module | None:
    """Return the part of a layer that contains its experts, or None."""
    return next((c for c in layer.children() if any(experts.is_routed(m) for m in c.modules())), None)


def _parts_of(ffns: Sequence[FFN], layer: nn.Module) -> set[int]:
    """Return the identities of a layer's expected modules: its FFNs, the attention, experts' routers."""
    expected = {id(m) for f in ffns for part in f.projections for m in part.modules()}  # adapters too
    for name, child in layer.named_children():
        inner = list(child.modules())
        if name in STREAMS or any(m is ffns[0].attention for m in inner) or any(experts.is_routed(m) for m in inner):
            expected.update(id(m) for m in inner)
    return expected


def _zeros(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.zeros_like(args[0]), *args[1:])


def _rows(x: Tensor) -> Tensor:
    """Return [..., D] as [T, D], float32 on the CPU: a copy, as models add in place (Falcon)."""
    return x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32, copy=True)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    if ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp_min(1e-6))


def _check_hidden(name: str, f: FFN, s: _Seen) -> None:
    if s.x is None or s.h is None or s.z is None:
        raise UserError(f"layer {f.number} of {name} did not run its FFN as described")
    f.dtype = s.x.dtype
    refuse_not_finite(s.x, f"inputs of the FFN of layer {f.number}")
    refuse_not_finite(s.h, f"intermediate values h of the FFN of layer {f.number}")
    theirs, ours = _rows(s.h), _rows(f.intermediate(s.x))
    if not _alike(ours, theirs):
        raise UserError(
            f"the FFN of layer {f.number} of {name} does more than act(gate x) * (up x)",
            "this family needs an entry of its own in dart_eval/layers/families.py",
        )


def _adds(f: FFN, s: _Seen) -> bool:
    """Whether the stream after the FFN is y + scale z, perhaps plus the attention's output."""
    if s.y is None or s.z is None or s.after is None or not s.y.shape == s.z.shape == s.after.shape:
        return False
    added = f.scale * s.z
    sums = [s.y + added]
    if s.attention is not None and s.attention.shape == s.y.shape:
        sums.append(s.y + s.attention + added)
    rounding = 2 * s.eps * (s.y.abs() + added.abs() + s.after.abs())
    allowed = rounding + TOLERANCE * added.abs().amax(-1, keepdim=True)
    return any(bool(((s.after - total).abs() <= allowed).all()) for total in sums)


def _passes(empty: _Seen) -> bool:
    """Whether the stream passes a layer without neurons unchanged, up to one constant for all tokens."""
    if empty.y is None or empty.after is None or empty.y.shape != empty.after.shape:
        return False
    added = empty.after - empty.y
    rounding = 4 * empty.eps * (empty.y.abs() + empty.after.abs()).amax(0)
    return bool(((added - added[:1]).abs() <= rounding).all())


def _check_alone(name: str, f: FFN, s: _Seen, empty: _Seen) -> None:
    """Refuse a layer in which something beside the known neurons adds to the stream.

    empty: activations with every neuron at 0. If the stream is a sum, its last term decides; else other weights do.
    """
    assert s.z is not None and empty.z is not None
    differs = (empty.z - empty.z[:1]).abs().max() > CONSTANT * s.z.abs().max()
    if s.mixture is not None and empty.mixture is not None:  # nothing else in it may have an output
        differs |= (empty.mixture - empty.mixture[:1]).abs().max() > CONSTANT * s.mixture.abs().max()
    if differs or (not f.adds and s.others):
        beside = f" ({', '.join(sorted(s.others))})" if s.others else ""
        raise UserError(
            f"layer {f.number} of {name} computes more than the FFN that would be pruned{beside}",
            "dense FFNs are supported, and experts that transformers keeps in one module",
        )
