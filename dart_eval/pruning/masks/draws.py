"""Draws: how a mask is taken from the scores of a layer's neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.part import Part, option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.pruning.masks.scores import AnyScore


@dataclass(frozen=True, kw_only=True)
class Draw(Part):
    """Base of all draws."""

    slot = "draw"

    def keys(self, scores: Tensor, keep: Tensor, layer: int, score: AnyScore) -> Tensor:
        """Return the sort keys that replace the scores, [B, F]: the largest are taken.

        Args:
            scores: [B, F], from `score.combine`.
            keep: [B] number of neurons to take, on the CPU.
        """
        raise NotImplementedError

    def draw(self, scores: Tensor, keep: Tensor, layer: int, score: AnyScore) -> Tensor:
        """Return the mask: [B, F] bool with exactly keep[b] neurons of each sequence. Arguments as of `keys`."""
        from dart_eval.kernels.top import top_k_mask

        return top_k_mask(self.keys(scores, keep, layer, score), keep)


@dataclass(frozen=True, kw_only=True)
class Best(Draw):
    """The neurons with the highest scores are taken."""

    name = "best"
    summary = "keeps the neurons with the highest scores"

    def keys(self, scores: Tensor, keep: Tensor, layer: int, score: AnyScore) -> Tensor:
        return scores


@dataclass(frozen=True, kw_only=True)
class Sample(Draw):
    """Neurons are drawn without replacement, each with a probability proportional to its score.

    The mask holds the neurons with the largest log score_j - log e_j, where e_j is exponentially distributed. GRIFFIN's
    code (arXiv 2404.01365, commit d1d3d6e) calls best=0 `sample` and best=0.5 `topk_sample`: the best floor(k / 2) are
    taken, and the rest is drawn. There each prompt draws anew. Here a layer has the same e for every text, so that
    neither batches nor restarts change a mask, and a re-mask changes little.
    """

    name = "sample"
    summary = "draws neurons in proportion to their scores, without replacement"
    best: float = option(0.0, "share of the mask that goes to the highest scores; the rest is drawn", least=0, most=1)
    seed: int = option(0, "seed of the draw; --seed by default", least=0, most=2**32 - 1)

    def keys(self, scores: Tensor, keep: Tensor, layer: int, score: AnyScore) -> Tensor:
        import torch

        from dart_eval.kernels.top import top_k_mask

        # Drawn on the CPU, so that a seed means the same neurons on every device.
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer)
        waits = torch.empty(scores.shape[-1]).exponential_(generator=generator).to(scores.device)
        keys = score.proportional(scores).float().log() - waits.log()
        best = (keep.double() * self.best + 1e-9).floor().long()
        return keys.masked_fill(top_k_mask(scores, best), torch.inf)


DRAWS = (Best, Sample)
