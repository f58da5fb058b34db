"""Statistics of a model before any prompt: activations on a text, their moments and quantiles.

They are computed when a method asks, and with a `StatsCache` only once for a model and text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dart_eval.layers import experts
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import input_device
from dart_eval.layers.verify import evaluating
from dart_eval.pruning.caches import StatsCache
from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text

See = Callable[[int, Tensor, Tensor], None]
DEFAULT_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"
ROUNDING_TEXT = DEFAULT_TEXT.with_name("rounding.txt")  # six times as long, for codes: they have more to fit
SEGMENT = 512  # tokens per forward, as far as the model has positions: enough for context, not too many for memory

BELOW_ALL = -1.0  # magnitudes are never negative: none lies below it
LOW_BITS = 13  # of a float32, ignored in a bin: 10 bits of the mantissa stay, and a bin is .1 % wide
BINS = 1 << (31 - LOW_BITS)


def passages(ids: Tensor, length: int, most: int | None) -> list[Tensor]:
    """Cut a text's tokens into passages of at most `length`: all of them, or random ones with `most` tokens in all."""
    every = list(ids.split(length))
    if most is None or most >= len(ids):
        return every
    drawn, rest = [], most
    for index in torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist():
        if rest > 0:
            drawn.append(every[index][:rest])
        rest -= len(every[index])
    return drawn


class Calibration:
    """The statistics that a method may use before any prompt, on a text (by default one that no shipped task uses).

    Args:
        path: a file, or a function that returns the text.
        tokens: of the text that are read at most; None: all.
        cache: statistics of earlier runs; None: none.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, path: str | Path | Callable[[], str] | None = None,
        tokens: int | None = None, cache: StatsCache | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.tokens, self.cache = model, tokenizer, tokens, cache
        self.path = DEFAULT_TEXT if path is None else path
        self._statistics: dict[str, list[Tensor]] = {}

    @property
    def ffns(self) -> list[FFN]:
        """The model's FFNs, layer by layer."""
        return find_ffns(self.model)

    @torch.no_grad()
    def sums(self, name: str, observe: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Return per layer [pool] fp32 a sum over all tokens.

        Args:
            name: of the statistic, in the cache.
            observe: h [1, T, pool] fp32 and weight [1, T] -> [1, pool].
        """
        return self.once(name, lambda: self._measure(observe))

    @torch.no_grad()
    def moments(self) -> list[Moments]:
        """Return per layer mean and variance of each neuron's activation over all tokens."""
        tensors = self.once("moments", self._moments)
        return [Moments(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]

    @torch.no_grad()
    def visit(self, see: See) -> None:
        """Call see(layer, x [T, D], h [T, F] fp32) with the inputs of FFNs and down projections, per passage."""
        inputs: dict[int, Tensor] = {}

        def enter(layer: int) -> Callable[..., None]:
            return lambda _module, args: inputs.update({layer: args[0].reshape(-1, args[0].shape[-1])})

        with contextlib.ExitStack() as hooks:
            for f in self.ffns:
                hooks.enter_context(f.block.register_forward_pre_hook(enter(f.layer)))
            self._run(lambda layer, h: see(layer, inputs.pop(layer)[-len(h) :], h))

    def once(self, name: str, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return a statistic on the CPU, from memory or the cache if possible. name: its cache key."""
        if name not in self._statistics:
            self._statistics[name] = self.kept(name, measure)
        return self._statistics[name]

    def kept(self, name: str, measure: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what is measured on the text, on the CPU, from the cache if possible. name: its cache key."""
        ids = hashlib.sha256(self._ids.numpy().tobytes()).hexdigest()
        of = {"statistic": name, "ids": ids, "tokens": self.tokens}
        tensors = None if self.cache is None else self.cache.get(of)
        if tensors is None:
            tensors = [tensor.cpu() for tensor in measure()]
            if self.cache is not None:
                self.cache.put(of, tensors)
        return tensors

    def batch(self, most: int) -> tuple[Tensor, Tensor]:
        """Return the text's passages as one batch.

        Args:
            most: tokens that are read, if not fewer are to be.

        Returns:
            [n, T] ids, filled up behind the ends of passages, where no token looks, and [n, T] bool, which are the
            text's.
        """
        passages_, skip = self._passages(most if self.tokens is None else min(most, self.tokens))
        ids = pad_sequence(passages_, batch_first=True, padding_value=int(passages_[0][-1]))
        length = torch.tensor([len(passage) for passage in passages_])
        place = torch.arange(ids.shape[1])
        return ids, (place >= skip) & (place < length[:, None])

    @functools.cached_property
    def _ids(self) -> Tensor:
        """The text's tokens."""
        if self.tokenizer is None:
            raise UserError("this method calibrates on text and needs the tokenizer", "pass tokenizer= to prune()")
        text = self.path() if callable(self.path) else read_text(self.path, "calibration text", "give a text file")
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])

    def _moments(self) -> list[Tensor]:
        """Return mean, variance and code_variance of every layer, one after the other."""
        running: dict[int, Running] = {}
        ffns = self.ffns

        def take(layer: int, h: Tensor) -> None:
            h = ffns[layer].spread(h[None])[0]
            if layer not in running:
                running[layer] = Running(h.shape[-1], h.device)
            running[layer].add(h)

        self._run(take)
        moments = [running[f.layer].moments for f in ffns]
        return [tensor for m in moments for tensor in (m.mean, m.variance, m.code_variance)]

    def _measure(self, observe: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        totals: dict[int, Tensor] = {}
        ffns = self.ffns

        def take(layer: int, h: Tensor) -> None:
            sums = observe(ffns[layer].spread(h[None]), torch.ones(1, len(h), device=h.device))
            totals[layer] = totals[layer] + sums[0] if layer in totals else sums[0]

        self._run(take)
        return [totals[f.layer] for f in ffns]

    def _run(self, take: Callable[[int, Tensor], None]) -> None:
        """Run the text, passage by passage. take: called with each layer's index and its h, [T, F] fp32."""
        segments, skip = self._passages(self.tokens)

        def watch(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                take(layer, args[0].reshape(-1, args[0].shape[-1])[skip:].float())

            return hook

        base = getattr(self.model, "base_model", self.model)
        device = input_device(self.model)
        with contextlib.ExitStack() as inside:
            for f in self.ffns:
                inside.enter_context(f.into.register_forward_pre_hook(watch(f.layer)))
            inside.enter_context(evaluating(self.model))
            inside.enter_context(experts.taken_over(self.model))
            for segment in segments:
                base(input_ids=segment[None].to(device), use_cache=False)

    def _passages(self, most: int | None) -> tuple[list[Tensor], int]:
        """Return passages that begin as prompts do, and how many first tokens of each do not count. most: that count.

        Raises:
            UserError: the text is empty.
        """
        ids = self._ids
        bos = getattr(self.tokenizer, "bos_token_id", None)
        skip = int(bos is not None and len(ids) > 0 and int(ids[0]) == bos)
        if len(ids) < 2 + skip:
            raise UserError("the calibration text is empty", "give another one")
        config: Any = self.model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or SEGMENT + skip
        drawn = passages(ids[skip:], max(1, min(SEGMENT, positions - skip)), most)
        return [torch.cat([ids[:skip], passage]) for passage in drawn], skip


@dataclass(frozen=True)
class Moments:
    """Moments of one layer over all tokens: [F] fp32 each.

    Attributes:
        mean: of h.
        variance: of h, divided by n and not n - 1.
        code_variance: the quantity that FLAP's code uses instead, see `Running`.
    """

    mean: Tensor
    variance: Tensor
    code_variance: Tensor


class Running:
    """Moments of one layer, passage by passage, in fp32.

    Squares are of distances from means, so that a constant added to h costs no precision. FLAP's code
    (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/layerwrapper.py`) updates its mean in place before it reads the old one. Its m-th
    passage adds S_m = sum_t (h_t - mean of the first m passages' means)^2, and the first one nothing, as

        variance_m = (m - 2) / (m - 1) * variance_(m - 1) + S_m / m
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = self.passages = 0
        self.mean, self.squares, self.middle, self.code = (torch.zeros(size, device=device) for _ in range(4))

    def add(self, h: Tensor) -> None:
        """Add a passage. h: [T, F] fp32, T at least 1."""
        n, mean = len(h), h.mean(0)
        within = (h - mean).square().sum(0)
        before, after = self.tokens, self.tokens + n
        apart = mean - self.mean
        self.squares = self.squares + within + apart.square() * (before * n / after)
        self.mean = self.mean + apart * (n / after)
        m = self.passages + 1
        self.middle = self.middle + (mean - self.middle) / m
        if m > 1:
            around = within + n * (mean - self.middle).square()
            self.code = self.code * ((m - 2) / (m - 1)) + around / m
        self.tokens, self.passages = after, m

    @property
    def moments(self) -> Moments:
        """Moments of the passages so far."""
        return Moments(self.mean, self.squares / max(1, self.tokens), self.code)


class Quantile:
    """The threshold that as many magnitudes of all tokens exceed as the tokens are to take.

    Magnitudes are counted in bins by the leading bits of a float32. The bit patterns of positive numbers have the order
    of the numbers, so the bins need no range.
    """

    def __init__(self) -> None:
        self.counts, self.share = torch.zeros(BINS, dtype=torch.int64), 0.0

    def add(self, values: Tensor, k: int) -> None:
        """Count tokens, [T, F], that are to take k neurons (or inputs) each."""
        patterns = values.float().abs().reshape(-1).view(torch.int32) >> LOW_BITS
        self.counts += torch.bincount(patterns, minlength=BINS).cpu()
        self.share = 1 - k / values.shape[-1]

    @property
    def threshold(self) -> float:
        """The lower edge of the bin that reaches the share of what is not taken: at most the share lies below it."""
        if self.share <= 0:
            return BELOW_ALL
        reached = self.counts.cumsum(0) >= math.ceil(self.share * int(self.counts.sum()) - 1e-6)  # .6 * 5 is 3
        edge = reached.int().argmax().to(torch.int32) << LOW_BITS
        return float(edge.view(torch.float32))
