"""Columns with the largest inputs times norms, after WINA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.inputs.entries import Entries, Inputs
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ByNorms(Entries):
    """A token reads the columns with the k largest |x_i| * ||W[:, i]||, after WINA (arXiv 2505.19427; wina at 8153dbf,
    `wina/mlp.py`).

    The released code has the norms of gate's columns alone: for up and down it takes the largest |x_i|. The paper says
    all matrices (`weigh=all`). k is int(n * (1 - s)) there; here what is cut off is carried over layers. The code's
    `--transform`, which makes columns orthogonal first, is left out, and attention is dense.
    """

    name = "norms"
    summary = "reads the columns with the largest input times norm, the same number for every token"
    granularity = "input channels"
    by_token = True
    weigh: Literal["gate", "all"] = option(
        "gate", "matrices whose column norms count: gate, as in the released code, or all, as in the paper"
    )

    def weighs(self, matrix: int) -> bool:
        return self.weigh == "all" or matrix == 0

    def columns_read(self, x: Tensor, inputs: Inputs) -> Tensor:
        import torch

        from dart_eval.kernels.top import top_k_mask

        score = x.abs() if inputs.norms is None else x.abs().float() * inputs.norms.to(x.device)
        return top_k_mask(score, torch.full(x.shape[:-1], inputs.count))

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        weighed = 1 if self.weigh == "gate" else shape.ffn_matrices - 1
        return shape.layers * shape.width * (weighed + 1) + mask * (2 if self.weigh == "all" else 1)
