"""Routings: experts are left out, in mixtures of experts alone.

Two controls for methods that leave out neurons of experts: fewer experts for each token, and fewer experts for all. A
third part leaves out bits of experts (`by_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dart_eval.pruning.part import Part, option
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.layers.experts import Routed
    from dart_eval.layers.ffn import FFN


def chosen(ffn: FFN) -> Routed | None:
    """Return the experts of an FFN that a router chooses among; None if every token has all of them."""
    routed = ffn.routed
    return None if routed is None or routed.count >= routed.all else routed


@dataclass(frozen=True, kw_only=True)
class Routing(Part):
    """Base of all routings.

    Attributes:
        sized: whether the sparsity sets the number of experts.
        granularity: the unit that is left out, if the read does not show it.
    """

    slot = "routing"
    sized: ClassVar[bool] = False
    granularity: ClassVar[str] = ""

    def check_experts(self, sparsity: float, ffns: Sequence[FFN]) -> None:
        """Refuse a model without experts, or a sparsity that cannot be met.

        Raises:
            UserError: names the highest possible sparsity, if there is one.
        """
        if not any(chosen(f) for f in ffns):
            raise UserError(
                f"{self.title} leaves out experts, and this model has none",
                "take a mixture of experts, or leave it out",
            )

    def counts(self, sparsity: float, ffns: Sequence[FFN]) -> list[int]:
        """Return [L] experts of a token in each layer; 0 in layers without experts.

        Args:
            sparsity: share of the bytes of all FFNs that a token does not read.
        """
        return [r.count if (r := chosen(f)) else 0 for f in ffns]

    def shares(self, sparsity: float, ffns: Sequence[FFN]) -> list[float] | None:
        """Return [L], the share of its bytes that a token reads of each layer; None if `counts` decides it."""
        return None

    def experts_left(self, experts: int) -> int:
        """Return the number of a layer's experts that the router may choose among."""
        return experts


@dataclass(frozen=True, kw_only=True)
class Fewer(Routing):
    """A token has the best of its routed experts alone: what a model reads whose `num_experts_per_tok` is smaller.

    The router itself is asked for fewer (`weights=own`): it chooses and weighs them as the type's own code does for
    that number, and so makes their weights sum to 1 again where it does so for all of them (Qwen3 MoE, Mixtral,
    gpt-oss), and leaves them as they are elsewhere (OLMoE). With `weights=all` they keep the weights that they have
    among all of a token's experts. Biases of experts that are left out are left out, too.

    The sparsity is met in whole experts. What it leaves is spread evenly over the layers, some of which have one expert
    more than others, and is never exceeded; every layer has one expert at least. FFNs that every token has (shared
    experts, dense layers) are read whole, so the routed experts bear all of it. This project's own control.
    """

    name = "fewer"
    summary = "gives each token only the best of its experts"
    sized = True
    weights: Literal["own", "all"] = option(
        "own", "the router's weights for the fewer experts, or those for all experts of a token"
    )

    def check_experts(self, sparsity: float, ffns: Sequence[FFN]) -> None:
        super().check_experts(sparsity, ffns)
        routed, everything = [r for f in ffns if (r := chosen(f))], sum(f.size for f in ffns)
        if min(self._budget(sparsity, ffns) / sum(r.size for r in routed) * r.count for r in routed) < 1 - 1e-9:
            fixed = sum(f.size for f in ffns if not chosen(f))
            least = fixed + max(1 / r.count for r in routed) * sum(r.size for r in routed)
            raise UserError(
                f"{self.title} leaves each token an expert in every layer, and sparsity {sparsity:g} leaves less",
                f"use a sparsity up to {math.floor(100 * (1 - least / everything) + 1e-9) / 100:g}",
            )

    def counts(self, sparsity: float, ffns: Sequence[FFN]) -> list[int]:
        self.check_experts(sparsity, ffns)
        share = self._budget(sparsity, ffns) / sum(f.size for f in ffns if chosen(f))
        rest, counts = 0.0, []  # neurons, experts
        for ffn in ffns:
            routed = chosen(ffn)
            if routed is None:
                counts.append(0)
                continue
            rest += share * ffn.size
            counts.append(min(routed.count, math.floor(rest / routed.inner + 1e-9)))
            rest -= counts[-1] * routed.inner
        return counts

    @staticmethod
    def _budget(sparsity: float, ffns: Sequence[FFN]) -> int:
        """Return the neurons of routed experts that a token may read, over all layers."""
        everything = sum(f.size for f in ffns)
        return round((1 - sparsity) * everything) - sum(f.size for f in ffns if not chosen(f))


@dataclass(frozen=True, kw_only=True)
class Without(Routing):
    """Experts that no token may have, after REAP (Router-weighted Expert Activation Pruning, arXiv 2510.13999).

    The experts with the least saliency are dropped: the mean of g_j(x) * ||f_j(x)||, router weight times norm of the
    output, over the tokens of the calibration text that have expert j. An expert that no token had has none. Every
    layer loses the same share of its experts, rounded down.

    The router's softmax and its choice go over the other experts alone. A token has as many experts as before, and
    reads as many bytes: the method saves memory and no reads. It has no sparsity: `share` is that of the routed
    experts' memory, and the read is 1.00. The board shows it in a level of its own. Here prompts
    run dense, as everywhere, with all experts; in REAP they run without these experts, too.
    """

    name = "without"
    summary = "removes the experts that matter least on a calibration text (saves memory, not reads)"
    calibrates = True
    granularity = "experts"
    share: float = option(0.5, "share of each layer's experts that are removed", above=0, most=1)

    def check_experts(self, sparsity: float, ffns: Sequence[FFN]) -> None:
        super().check_experts(sparsity, ffns)
        for routed in (r for f in ffns if (r := chosen(f))):
            if self.experts_left(routed.all) < routed.count:
                most = math.floor(100 * (1 - routed.count / routed.all)) / 100
                raise UserError(
                    f"{self.title} leaves {self.experts_left(routed.all)} of {routed.all} experts, and a token has "
                    f"{routed.count}",
                    f"use a routing.share up to {most:g}",
                )

    def experts_left(self, experts: int) -> int:
        return experts - math.floor(self.share * experts + 1e-9)
