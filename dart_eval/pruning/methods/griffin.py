"""GRIFFIN (arXiv 2404.01365), and the masks that all texts share.

    score_j^2 = sum over the prompt's tokens of (|h_tj| / ||h_t||)^2,   h = act(gate x) * (up x)

Each sequence keeps the k neurons with the highest scores, the same share in every layer, from the end of its prompt on.
The sums have the order of their roots, the scores, which only a draw takes. Commit d1d3d6e of its code draws the mask,
too, `draw=sample` (there `sample`, and `topk_sample` for `draw.best=0.5`): the best floor(best k) neurons are taken,
and the rest is drawn without replacement, each with a probability proportional to its score: those with the largest
log score_j - log e_j, e_j exponentially distributed. There each prompt draws anew. Here a layer has the same e for
every text, so that neither batches nor restarts change a mask.

The masks of all texts rank neurons by

    random      a seeded random order
    magnitude   ||gate_j|| ||up_j||, the norms of their rows (of a plain FFN, up's): GRIFFIN's static baseline
    static      GRIFFIN's score on a calibration text
    wanda-sp    mean_i |down_ij| * ||h_j||, the norm over the tokens of a calibration text

Wanda's weight times activation (2306.11695) is structured to whole neurons as FLAP (2312.11983) and Probe Pruning
(2502.15618) do. FLAP's code (CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`) divides the sum of squares by the number of
sequences, which leaves the order; it keeps all neurons that tie, and its layers see what the pruned layers before them
give. Here exactly k are kept, and every layer sees dense inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dart_eval.kernels.mask_rows import copies_bytes
from dart_eval.kernels.top import top_k_mask
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.counts import NeuronCost, in_steps, keep_counts
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.rows import Rows, nbytes

SEEDS = 2**32 - 1


def squares(h: Tensor, weight: Tensor) -> Tensor:
    """Return sum_t weight_t h_t^2: [B, F]. h: [B, T, F] fp32; weight: [B, T]."""
    return (weight[:, None] @ h.square()).squeeze(1)


def relative_squares(h: Tensor, weight: Tensor) -> Tensor:
    """Return GRIFFIN's sums, of squares relative to each token's norm: [B, F]. Arguments as of `squares`."""
    values = h.square()
    return ((weight / values.sum(-1).clamp_min(1e-30))[:, None] @ values).squeeze(1)


class NeuronMask(Method):
    """Base of methods with a mask of neurons, for each sequence or for all."""

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        self.cost = NeuronCost(ffns, sparsity)
        self.labelled = self.kept([1 - sparsity] * len(ffns))

    def kept(self, densities: Sequence[float]) -> Tensor:
        """Return [L, 3] long, the counts of neurons for densities of the layers: equally many of each expert."""
        sizes = [f.size for f in self.ffns]
        keep = keep_counts(densities, sizes, self.sparsity)
        if any(f.routed for f in self.ffns):
            keep = in_steps(keep, sizes, [f.routed.count if f.routed else 1 for f in self.ffns])
        return torch.tensor(keep)[:, None].repeat(1, 3)

    def decode(self, ffn: FFN, h: Tensor, rows: Rows) -> Tensor:
        if not (masks := self.masks(rows)):
            return h
        mask = ffn.of_token(masks[ffn.layer].to(h.device), len(h))
        return h * mask.view(torch.uint8)  # four times as fast as booleans on a CPU

    def expected_read(self, rows: Rows) -> Tensor:
        return self.cost.read(rows.counts)

    def in_mask(self, rows: Rows) -> Tensor:
        return rows.counts[..., 0].double().sum(1) / self.cost.neurons

    def computed(self, read: float) -> float:
        return self.cost.computed(self.labelled, read)

    def why_no_kernel(self, ffns: Sequence[FFN]) -> str | None:
        return None

    def weight_bytes(self, fast: bool) -> int:
        kept = zip(self.ffns, self.labelled[:, 0].tolist(), strict=True)
        return sum(copies_bytes(f, count) for f, count in kept) if fast else 0


class PromptMask(NeuronMask):
    """Base of methods whose sequences have masks of their own, from their own tokens."""

    needs_context = True
    keeps_state = True
    observe_flops = 5  # a square and a sum for the norm; a square, a division and a sum for the score

    def observe(self, ffn: FFN, h: Tensor, weight: Tensor) -> Tensor:
        return relative_squares(h, weight)

    def densities(self, rows: Rows, index: Tensor) -> list[float]:
        """Return [L], the share of each layer's neurons that the sequences `index` keep together."""
        return [1 - self.sparsity] * len(self.ffns)

    def finish(self, rows: Rows, valid: Tensor) -> None:
        rows.counts = torch.stack([
            self.kept(self.densities(rows, index)) if bool(rows.seen[index].sum()) else self.cost.counts
            for index in rows.together
        ])  # fmt: skip
        every = torch.arange(len(rows))
        rows.mask = [self.best(rows, f, sums, every) for f, sums in zip(self.ffns, rows.per_token(), strict=True)]

    def best(self, rows: Rows, ffn: FFN, sums: Tensor, index: Tensor) -> Tensor:
        """Return the masks of the sequences `index` ([b]) with the highest sums ([b, pool]): [b, pool] bool."""
        if rows.shared:
            sums = sums.mean(0, keepdim=True).expand_as(sums)
        keep = rows.counts[index.cpu(), ffn.layer, 0]
        return ffn.mask_of(lambda scores, k: top_k_mask(self.keys(scores, k, ffn.layer), k), sums, keep)

    def keys(self, scores: Tensor, keep: Tensor, layer: int) -> Tensor:
        """Return [b, F], of which the `keep` ([b]) largest are taken."""
        return scores

    def masks(self, rows: Rows) -> list[Tensor]:
        return rows.mask

    def expected_read(self, rows: Rows) -> Tensor:
        return self.where_masked(rows, super().expected_read(rows))

    def in_mask(self, rows: Rows) -> Tensor:
        return self.where_masked(rows, super().in_mask(rows))

    def where_masked(self, rows: Rows, share: Tensor) -> Tensor:
        """Return a share, [B], and 1 for sequences that run dense, since they had no context."""
        return torch.where(rows.seen.cpu() > 0, share, 1.0) if rows.mask else torch.ones_like(share)


class Griffin(PromptMask):
    """The k neurons that were most active in the prompt, the same share in every layer."""

    name = "griffin"
    summary = "keeps the neurons that were most active in the prompt, the same number in every layer"
    paper = "2404.01365"
    recorded: ClassVar = {
        "mask": "prompt", "score": "activation", "score.norm": "l2", "remask": "never", "remask.release": 0,
        "allocation": "uniform",
    }  # fmt: skip
    draw: Literal["best", "sample"] = option("best", "keep the highest scores, or draw in proportion to them")
    draw_best: float = option(
        0.0, "share of the mask that goes to the highest scores; the rest is drawn", least=0, most=1, when="sample"
    )
    draw_seed: int = option(0, "seed of the draw; --seed by default", least=0, most=SEEDS, when="sample")

    def keys(self, scores: Tensor, keep: Tensor, layer: int) -> Tensor:
        if self.draw == "best":
            return scores
        # Drawn on the CPU, so that a seed means the same neurons on every device.
        generator = torch.Generator().manual_seed(self.draw_seed * 100_003 + layer)
        waits = torch.empty(scores.shape[-1]).exponential_(generator=generator).to(scores.device)
        best = (keep.double() * self.draw_best + 1e-9).floor().long()
        drawn = scores.sqrt().float().log() - waits.log()
        return drawn.masked_fill(top_k_mask(scores, best), torch.inf)


class Oracle(PromptMask):
    """GRIFFIN's mask, made from the very tokens that then run under it (`Session.foresee`): an upper bound.

    Only answers that are given can be scored so.
    """

    name = "oracle"
    summary = "makes the mask from the same tokens that then run under it (upper bound)"
    recorded: ClassVar = {"mask": "ahead", "score": "activation", "score.norm": "l2", "allocation": "uniform"}
    looks_ahead = True
    upper_bound = True


class StaticMask(NeuronMask):
    """Base of masks that all texts share, made before any prompt."""

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        """Return the scores of the neurons, per layer [pool]. The highest are kept."""
        raise NotImplementedError

    def densities(self, scores: Sequence[Tensor]) -> list[float]:
        """Return [L], the share of each layer's neurons that is kept."""
        return [1 - self.sparsity] * len(self.ffns)

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        super().fit(ffns, sparsity, calibration)
        # The weights of a model without weights give no scores.
        scores = [torch.zeros_like(s, device="cpu") if s.is_meta else s for s in self.scores(calibration)]
        self.counts = self.kept(self.densities(scores))
        self.fixed = [
            f.mask_of(top_k_mask, s[None], k).to(device_of(f))
            for f, s, k in zip(ffns, scores, self.counts[:, :1], strict=True)
        ]

    def begin(self, rows: Rows) -> None:
        rows.counts = self.counts.repeat(len(rows), 1, 1)

    def masks(self, rows: Rows) -> list[Tensor]:
        return self.fixed

    def nbytes(self) -> int:
        return nbytes(self.fixed)


class Random(StaticMask):
    """A random set of neurons in each layer."""

    name = "random"
    summary = "keeps a random set of neurons in each layer, the same for every text"
    recorded: ClassVar = {"mask": "static", "score": "random", "allocation": "uniform", "compensation": "none"}
    score_seed: int = option(0, "seed of the draw; --seed by default", least=0, most=SEEDS)

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        # Drawn on the CPU, so that a seed means the same neurons on every device.
        generators = (torch.Generator().manual_seed(self.score_seed * 100_003 + f.layer) for f in self.ffns)
        return [torch.rand(f.pool, generator=g) for f, g in zip(self.ffns, generators, strict=True)]


class Magnitude(StaticMask):
    """The neurons with the largest norms of gate and up rows."""

    name = "magnitude"
    summary = "keeps the neurons with the largest norms of gate and up rows, the same for every text"
    paper = "2404.01365"
    recorded: ClassVar = {"mask": "static", "score": "weights", "allocation": "uniform", "compensation": "none"}

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        norms = ([w.float().norm(dim=1) for w in f.input_weights()] for f in self.ffns)
        return [math.prod(of_layer, start=1.0) for of_layer in norms]  # type: ignore[misc]


class Static(StaticMask):
    """The neurons with the highest GRIFFIN scores on a calibration text."""

    name = "static"
    summary = "keeps the neurons with the highest griffin scores on a calibration text"
    recorded: ClassVar = {
        "mask": "static", "score": "activation", "score.norm": "l2", "allocation": "uniform", "compensation": "none",
    }  # fmt: skip
    calibrates = True

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        assert calibration is not None
        return calibration.sums("relative squares", relative_squares)


class WandaSP(StaticMask):
    """The neurons with the largest |down| times activation norm on a calibration text."""

    name = "wanda-sp"
    summary = "keeps the neurons with the largest |down| times activation norm on a calibration text"
    paper = "2306.11695"
    recorded: ClassVar = {"mask": "static", "score": "wanda", "allocation": "uniform", "compensation": "none"}
    calibrates = True

    def scores(self, calibration: Calibration | None) -> list[Tensor]:
        assert calibration is not None
        sums = calibration.sums("squares", squares)
        weights = (f.output_weight().float().abs().mean(0) for f in self.ffns)
        return [weight * total.sqrt().to(weight.device) for weight, total in zip(weights, sums, strict=True)]
