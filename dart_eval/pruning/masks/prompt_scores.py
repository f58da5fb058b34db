"""Scores of rivals that look at the prompt: how often a neuron is among the largest, ranks of two texts, probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.masks.scores import Score, activations
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.pruning.calibration.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Votes(Score):
    """score_j = the number of tokens for which h_tj is among the n_t largest, by signed value.

    n_t = floor(share * the number of positive h_tj). From arXiv 2410.18311 (CoreInfer) and its code (commit 38de332).
    There n is one number for the whole prompt, from the mean count of positive h. Here each token has its own, as in
    the paper, so that no later token changes an earlier one's votes. If too few neurons have a vote, the code keeps
    fewer; here the first of the others fill up, so that the sparsity is met.
    """

    name = "votes"
    summary = "ranks neurons by the number of context tokens in which they are among the most active"
    needs_context = True
    flops_per_neuron = 2  # a comparison, and a vote at most; sorting takes comparisons, which are not counted
    share: float = option(0.2, "share of a token's positive activations that counts as most active", above=0, most=1)

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        import torch

        positive = (h > 0).sum(-1, keepdim=True)
        count = (positive.double() * self.share + 1e-9).floor().long()
        most = int(count.max())
        order = h.argsort(dim=-1, descending=True, stable=True)[..., :most]  # equal ones: the first
        counted = weight[..., None] * (torch.arange(most, device=h.device) < count)
        return h.new_zeros(h.shape[0], h.shape[-1]).scatter_add_(1, order.flatten(1), counted.flatten(1).to(h.dtype))


@dataclass(frozen=True, kw_only=True)
class Ranks(Score):
    """score_j = local * rank of neuron j in the prompt + (1 - local) * its rank on the calibration text.

    The largest activation of a layer has the highest rank. After the abstract of arXiv 2508.14302 (GLASS: a weighted
    aggregation of a prompt's ranks and a model's own); no code was found. That the activations are GRIFFIN's, and that
    the weight is a half, are ours. The variant whose statistics are impacts on the loss is not here.
    """

    name = "ranks"
    summary = "ranks neurons by a weighted mean of their ranks in the context and on a calibration text"
    needs_context = True
    calibrates = True
    flops_per_neuron = 5  # as GRIFFIN's
    local: float = option(0.5, "weight of the rank in the context; the calibration text has the rest", least=0, most=1)

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        return activations(h, weight, "l2")

    def factors(self, calibration: Calibration) -> list[Tensor] | None:
        return [ranks(sums) for sums in calibration.sums(self.observe)]

    def combine(self, sums: Tensor | None, factor: Tensor | None) -> Tensor:
        assert sums is not None and factor is not None
        return self.local * ranks(sums) + (1 - self.local) * factor.to(sums.device)


@dataclass(frozen=True, kw_only=True)
class Probe(Score):
    """score_j = s_j * sqrt(sum_i W_down[i, j]^4), s = (p^2 + q^2) / (p + q).

    p_j is the mean of h_tj^2 over the context's tokens of the probe, q_j that over the calibration text (the history).
    From arXiv 2502.15618 (Probe Pruning) and its code (src/model/pruning_module.py, commit acc0730), for a batch of one
    sequence. There p and q are per position, s is summed over positions, and the history follows the batches. Here sums
    over tokens have no positions, and no sequence may change another. There the probe is the tokens with the largest
    norms of the residual stream, which saves computing the others. Here a prompt runs dense, so all of its tokens can
    be the probe, and a share of them is evenly spaced, however the prompt is cut into chunks.
    """

    name = "probe"
    summary = "ranks neurons by their weights and by activations fused from the context and a calibration text"
    needs_context = True
    per_token = True
    flops_per_neuron = 2
    share: float = option(1.0, "share of the context's tokens, evenly spaced, that make the probe", above=0, most=1)
    history: bool = option(True, "fuse with the activations on the calibration text")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.history

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        return activations(h, weight)

    @property
    def weighs_tokens(self) -> bool:  # type: ignore[override]
        return self.share < 1

    def token_weights(self, valid: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = valid.float()
        if self.share < 1:
            count = valid.double().cumsum(1) + before.double()[:, None]
            # The first of every 1 / share tokens.
            inside = (count * self.share - 1e-9).ceil() > ((count - 1) * self.share - 1e-9).ceil()
            weight = weight * inside
        return weight, None

    def factors(self, calibration: Calibration) -> list[Tensor] | None:
        """Return [2, F] per layer: the root of the sum of fourth powers of a column of down, and q."""
        import torch

        from dart_eval.pruning.calibration.calibration import means

        columns = [ffn.output_weight().float().pow(4).sum(0).sqrt() for ffn in calibration.ffns]
        history = means(calibration, self.observe) if self.history else [torch.zeros_like(c) for c in columns]
        return [torch.stack([c, q.to(c.device)]) for c, q in zip(columns, history, strict=True)]

    def combine(self, sums: Tensor | None, factor: Tensor | None) -> Tensor:
        assert sums is not None and factor is not None
        column, history = factor.to(sums.device)
        total = (sums + history).clamp_min(1e-30)
        return column * (sums * (sums / total) + history * (history / total))


PROMPT_SCORES = (Votes, Ranks, Probe)


def ranks(scores: Tensor) -> Tensor:
    """Return [..., F] fp32: F for the largest score down to 1 for the smallest; of equal scores the first is higher."""
    import torch

    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], 0, -1, device=scores.device, dtype=torch.float32)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(-1, order, places.expand(scores.shape))
