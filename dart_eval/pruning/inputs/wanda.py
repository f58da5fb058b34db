"""Single weights that matter least, after Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dart_eval.pruning.inputs.entries import Entries, Inputs
from dart_eval.pruning.part import option

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.util.bits import Stored


@dataclass(frozen=True, kw_only=True)
class WandaEntries(Entries):
    """Of each output's weights the least |W_ij| * ||x_j|| are 0, after Wanda (arXiv 2306.11695; wanda at 8e8fc87,
    `lib/prune.py`, `lib/layerwrapper.py`); 2:4 leaves two of every four neighbours.

    Read counts the weights that are left, and for 2:4 also 2 bits for the place of each. Without a pattern the places
    would take bits too; they are not counted, which favours the method. There activations come from C4, layer after
    layer of the pruned model, attention is pruned too, and prompts run pruned; here from the calibration text on the
    dense model.
    """

    name = "wanda"
    summary = "leaves out the weights with the least |W| times input norm on a calibration text, for all texts"
    granularity = "single weights"
    calibrates = True
    pattern: Literal["none", "2:4"] = option(
        "none", "leave out any weights of an output, or two of every four (the sparsity is then ignored)"
    )

    @property
    def sized(self) -> bool:  # type: ignore[override]
        return self.pattern == "none"

    def bytes_read(self, density: float, bits: Stored, rows: int, width: int) -> float:
        if self.sized:
            return self.share(density, bits)
        kept = (width // 4 * 2 + min(2, width % 4)) / width
        return self.share(kept, bits) + 2 * kept / bits.total

    def multiplied(self, read: float) -> float:
        return read if self.sized else 0.5  # places are no products

    def as_read(self, weight: Tensor, inputs: Inputs) -> Tensor:
        import torch

        from dart_eval.kernels.top import top_k_mask

        assert inputs.sizes is not None
        score = weight.float().abs() * inputs.sizes.to(weight.device)
        if self.sized:
            return weight * top_k_mask(score, torch.full((len(score),), inputs.count))
        width = score.shape[1]
        fours = torch.nn.functional.pad(score, (0, -width % 4), value=-1.0).reshape(-1, 4)
        return weight * top_k_mask(fours, torch.full((len(fours),), 2)).view(len(score), -1)[:, :width]
