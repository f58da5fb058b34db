"""What methods may know of a model before any prompt: activations on a text, projections onto the vocabulary.

Computed once, when a method asks, and where a `StatsCache` is given never again for the same model and text.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dart_eval.layers import experts
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import find_ffns
from dart_eval.layers.quantised import input_device
from dart_eval.layers.verify import evaluating
from dart_eval.pruning.calibration.moments import Moments, Running
from dart_eval.pruning.calibration.stats_cache import StatsCache
from dart_eval.pruning.calibration.vocabulary import Projection, project
from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text
from dart_eval.util.source import PACKAGE, source_hash

Observe = Callable[[Tensor, Tensor | None, Tensor], Tensor | None]
See = Callable[[int, Tensor, Tensor], None]
DEFAULT_TEXT = Path(__file__).parents[2] / "data" / "calibration.txt"
SEGMENT = 512  # tokens per forward, as far as the model has positions: enough for context, not too many for memory


@runtime_checkable
class Calibration(Protocol):
    """What a method may look at before any prompt is seen."""

    @property
    def ffns(self) -> list[FFN]:
        """The model's FFNs, layer by layer."""
        ...

    def sums(self, observe: Observe) -> list[Tensor]:
        """Per layer [F] fp32: the sum over the calibration text's tokens of what `observe` makes of them."""
        ...

    def moments(self) -> list[Moments]:
        """Per layer, mean and variance of each neuron's activation over the calibration text's tokens."""
        ...

    def visit(self, see: See) -> None:
        """Show what enters FFNs and down projections: see(layer, x [T, D], h [T, F] fp32), passage by passage."""
        ...

    def once(self, name: str | None, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A statistic on the CPU, measured if it is not known. name: what tells it from others; None: nothing does."""
        ...

    def projection(self) -> list[Projection]:
        """Per layer, what its neurons write to the vocabulary."""
        ...


@dataclass(frozen=True)
class Passages:
    """What is read of a text: all of it, or passages that are drawn until there are so many tokens.

    Attributes:
        tokens: how many at most; None: all. seed: of the draw.
    """

    tokens: int | None = None
    seed: int = 0

    def cut(self, ids: Tensor, length: int) -> list[Tensor]:
        """The passages of a text's tokens, each at most so long; the last one drawn is cut short."""
        every = list(ids.split(length))
        if self.tokens is None or self.tokens >= len(ids):
            return every
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn, left = [], self.tokens
        for index in order:
            if left > 0:
                drawn.append(every[index][:left])
            left -= len(every[index])
        return drawn


class TextCalibration:
    """Calibration on a text (by default the project's own, which no shipped task uses).

    Args:
        path: a file, or what gives the text when it is asked for.
        passages: what is read of the text.
        kept: where statistics are kept for later runs; None: nowhere.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, path: str | Path | Callable[[], str] | None = None,
        passages: Passages = Passages(), kept: StatsCache | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.passages, self.kept = model, tokenizer, passages, kept
        self.path = DEFAULT_TEXT if path is None else path
        self._projection: list[Projection] | None = None
        self._known: dict[str, list[Tensor]] = {}

    @property
    def ffns(self) -> list[FFN]:
        return find_ffns(self.model)

    @torch.no_grad()
    def sums(self, observe: Observe) -> list[Tensor]:
        """Per layer [F] fp32: the sum over all tokens of what `observe` makes of them (`Part.observe`)."""
        return self.once(named(observe), lambda: self._measure(observe))

    @torch.no_grad()
    def moments(self) -> list[Moments]:
        """Per layer, mean and variance of each neuron's activation over all tokens."""
        found = self.once("moments", self._moments)
        return [Moments(*found[i : i + 3]) for i in range(0, len(found), 3)]

    @torch.no_grad()
    def visit(self, see: See) -> None:
        """Show what enters FFNs and down projections: see(layer, x [T, D], h [T, F] fp32), passage by passage."""
        inputs: dict[int, Tensor] = {}

        def enter(layer: int) -> Any:
            return lambda _module, args: inputs.update({layer: args[0].reshape(-1, args[0].shape[-1])})

        handles = [f.block.register_forward_pre_hook(enter(f.layer)) for f in self.ffns]
        try:
            self._run(lambda layer, h: see(layer, inputs.pop(layer)[-len(h) :], h))
        finally:
            for handle in handles:
                handle.remove()

    def once(self, name: str | None, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A statistic on the CPU, measured if it is not known. name: what tells it from others; None: nothing does."""
        if name is None:
            return measure()
        if name not in self._known:
            text = hashlib.sha256(self._text().encode()).hexdigest()
            of = {"statistic": name, "text": text, "tokens": self.passages.tokens, "seed": self.passages.seed}
            found = None if self.kept is None else self.kept.get(of)
            if found is None:
                found = [tensor.cpu() for tensor in measure()]
                if self.kept is not None:
                    self.kept.put(of, found)
            self._known[name] = found
        return self._known[name]

    def _text(self) -> str:
        if self.tokenizer is None:
            raise UserError("this method calibrates on text and needs the tokenizer", "pass tokenizer= to prune()")
        return self.path() if callable(self.path) else read_text(self.path, "calibration text", "give a text file")

    def _moments(self) -> list[Tensor]:
        """Of every layer mean, variance and code_variance."""
        running: dict[int, Running] = {}
        ffns = self.ffns

        def take(layer: int, h: Tensor) -> None:
            h = ffns[layer].spread(h[None])[0]
            if layer not in running:
                running[layer] = Running(h.shape[-1], h.device)
            running[layer].add(h)

        self._run(take)
        found = [running[f.layer].moments for f in ffns]
        return [tensor for m in found for tensor in (m.mean, m.variance, m.code_variance)]

    def projection(self) -> list[Projection]:
        """Per layer, what its neurons write to the vocabulary. A matrix product of the size of FFNs x vocabulary."""
        if self._projection is None:
            self._projection = project(self.model, self.ffns)
        return self._projection

    def _measure(self, observe: Observe) -> list[Tensor]:
        totals: dict[int, Tensor] = {}
        ffns = self.ffns

        def take(layer: int, h: Tensor) -> None:
            sums = observe(ffns[layer].spread(h[None]), None, torch.ones(1, len(h), device=h.device))
            assert sums is not None
            totals[layer] = totals[layer] + sums[0] if layer in totals else sums[0]

        self._run(take)
        return [totals[f.layer] for f in ffns]

    def _run(self, take: Callable[[int, Tensor], None]) -> None:
        """Run the text, passage by passage. take: given each layer's index and its h of a passage, [T, F] fp32."""
        ids = torch.tensor(self.tokenizer(self._text(), verbose=False)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        skip = int(bos is not None and len(ids) > 0 and int(ids[0]) == bos)  # segments begin as prompts do, uncounted
        ids = ids[skip:]
        if len(ids) < 2:
            raise UserError("the calibration text is empty", "give another one")

        def watch(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                take(layer, args[0].reshape(-1, args[0].shape[-1])[skip:].float())

            return hook

        handles = [f.into.register_forward_pre_hook(watch(f.layer)) for f in self.ffns]
        base = getattr(self.model, "base_model", self.model)
        device = input_device(self.model)
        config: Any = self.model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or SEGMENT + skip
        try:
            with evaluating(self.model), experts.taken_over(self.model):
                for segment in self.passages.cut(ids, max(1, min(SEGMENT, positions - skip))):
                    start = torch.tensor([bos] * skip, dtype=segment.dtype)
                    base(input_ids=torch.cat([start, segment])[None].to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Counting:
    """Sums of what `observe` makes of tokens, [B, F], and in one more column of their weights."""

    observe: Observe

    def __call__(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        sums = self.observe(h, up, weight)
        assert sums is not None
        return torch.cat([sums, weight.sum(1, keepdim=True)], 1)


def means(calibration: Calibration, observe: Observe) -> list[Tensor]:
    """Per layer [F] fp32: the mean over the calibration text's tokens of what `observe` makes of them."""
    return [sums[:-1] / sums[-1] for sums in calibration.sums(Counting(observe))]


def named(does: Callable[..., Any]) -> str | None:
    """What tells the statistics of a part from those of others: its class, fields, and code where that is not ours.

    Args:
        does: a method of the part; None comes back where it is none, and nothing can be said.
    """
    counting = isinstance(does, Counting)
    part = getattr(does.observe if isinstance(does, Counting) else does, "__self__", None)
    module = inspect.getmodule(type(part))
    if part is None or module is None:
        return None
    said = f"{type(part).__module__}.{type(part).__qualname__} {part!r}{' and a count' if counting else ''}"
    if type(part).__module__.split(".")[0] == PACKAGE:
        return said
    try:
        return f"{said} {source_hash(inspect.getsource(module))}"
    except (OSError, TypeError):  # typed at a prompt
        return None
