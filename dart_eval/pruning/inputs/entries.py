"""Entries: which weights inside the matrices a token reads, where that is no matter of whole neurons.

A part here leaves out columns of a matrix, by the inputs of a token, or single weights, for all tokens alike. Its rows
are another granularity than neurons: a kernel must gather columns or skip single weights. `rounded` leaves out the last
bits of every weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from dart_eval.pruning.part import Part, option
from dart_eval.util.bits import LAST_BITS, OWN_BITS, Rounding, parse
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape
    from dart_eval.util.bits import Stored

Share = TypeVar("Share", float, "Tensor")


@dataclass(frozen=True)
class Inputs:
    """What is known of the n inputs of a matrix before any prompt.

    Attributes:
        count: how many of them a token is to read, or each output.
        threshold: the number that so many of their magnitudes are above on the calibration text; None without one.
        norms: [n] fp32, of the columns of the matrix, where the part weighs by them.
        sizes: [n] fp32, root of the sum of squares of each input over the calibration text; None without one.
    """

    count: int
    threshold: float | None = None
    norms: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Entries(Part):
    """Base of all of them.

    Attributes:
        granularity: of what is left out.
        by_token: whether each token reads columns of its own; else single weights are 0 for all of them.
        sized: whether the sparsity decides how many are left out.
    """

    slot = "entries"
    granularity: ClassVar[str]
    fits_experts = False
    by_token: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    def check(self, bits: Stored) -> None:
        """Refuse weights that it is not made for. bits: of a weight as it is served.

        Raises:
            UserError: with the reason.
        """

    def weighs(self, matrix: int) -> bool:
        """Whether it needs the norms of the columns of a matrix. matrix: 0 is gate (or the up of a plain FFN)."""
        return False

    def read(self, densities: float, bits: Stored, weight: Tensor) -> float:
        """Bytes that a token reads of a matrix / all of it.

        Args:
            densities: share of its columns, or of the weights of its rows, that the sparsity leaves.
            bits: of a weight as it is served.
            weight: [out, n], the matrix.
        """
        return self.share(densities, bits)

    def share(self, some: Share, bits: Stored) -> Share:
        """Bytes of so large a share of the weights / all: each scale stands for weights of several columns."""
        return (some * bits.code + bits.scale) / bits.total

    def kept(self, x: Tensor, inputs: Inputs) -> Tensor:
        """[..., n] bool, the columns that each token reads. x: [..., n], the inputs of the matrix."""
        raise NotImplementedError

    def left(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """[out, n] bool, the weights that are read, by whatever token. weight: [out, n]."""
        raise NotImplementedError

    def values(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """[out, n], what tokens read of a matrix, where it is the same for all of them. weight: [out, n]."""
        return weight * self.left(weight, inputs)


@dataclass(frozen=True, kw_only=True)
class Above(Entries):
    """A token reads the columns of the inputs with |x_i| > t, a threshold for each layer and kind of input, after TEAL
    (arXiv 2408.14690; TEAL at 5baaec8, `utils/utils.py`).

    t is the quantile of |x| over all inputs and tokens of a text: of x for gate and up, of h for down. How many columns
    a token reads varies and is measured. TEAL takes t off a histogram of x in 10 000 bins (1 % of outliers beyond it),
    of which it assumes a mean of 0 and equal sides, on Alpaca; and it finds the sparsity of each matrix by a greedy
    search, which is left out here: every matrix has the same. Attention, which TEAL thins too, is dense here.
    """

    name = "threshold"
    summary = "reads columns of inputs above a number a layer, from the calibration text (what it reads varies)"
    granularity = "input channels"
    by_token = True
    calibrates = True

    def kept(self, x: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.threshold is not None
        return x.abs() > inputs.threshold

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.layers * shape.width + mask  # gate and up have one input


@dataclass(frozen=True, kw_only=True)
class ByNorms(Entries):
    """A token reads the columns with the k largest |x_i| * ||W[:, i]||, after WINA (arXiv 2505.19427; wina at 8153dbf,
    `wina/mlp.py`).

    The released code has the norms of gate's columns alone: for up and down it takes the largest |x_i|. The paper says
    all matrices (`weigh=all`). k is int(n * (1 - s)) there; here what is cut off is carried over layers. The code's
    `--transform`, which makes columns orthogonal first, is left out, and attention is dense.
    """

    name = "norms"
    summary = "reads columns with the largest inputs times norms, equally many for every token"
    granularity = "input channels"
    by_token = True
    weigh: Literal["gate", "all"] = option(
        "gate", "matrices whose norms count: gate, as in the released code, or all, as in the paper"
    )

    def weighs(self, matrix: int) -> bool:
        return self.weigh == "all" or matrix == 0

    def kept(self, x: Tensor, inputs: Inputs) -> Tensor:
        import torch

        from dart_eval.kernels.top import top_k_mask

        score = x.abs() if inputs.norms is None else x.abs().float() * inputs.norms.to(x.device)
        return top_k_mask(score, torch.full(x.shape[:-1], inputs.count))

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        weighed = 1 if self.weigh == "gate" else shape.ffn_matrices - 1
        return shape.layers * shape.width * (weighed + 1) + mask * (2 if self.weigh == "all" else 1)


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
    summary = "leaves out the least weights times activations on a calibration text, the same for every text"
    granularity = "single weights"
    calibrates = True
    pattern: Literal["none", "2:4"] = option(
        "none", "leave out any weights of an output, or two of every four (the sparsity then says nothing)"
    )

    @property
    def sized(self) -> bool:  # type: ignore[override]
        return self.pattern == "none"

    def read(self, densities: float, bits: Stored, weight: Tensor) -> float:
        return self.share(densities, bits) if self.sized else self.share(0.5, bits) + 1 / bits.total

    def left(self, weight: Tensor, inputs: Inputs) -> Tensor:
        import torch

        from dart_eval.kernels.top import top_k_mask

        assert inputs.sizes is not None
        score = weight.float().abs() * inputs.sizes.to(weight.device)
        if self.sized:
            return top_k_mask(score, torch.full((len(score),), inputs.count))
        width = score.shape[1]
        fours = torch.nn.functional.pad(score, (0, -width % 4), value=-1.0).reshape(-1, 4)
        return top_k_mask(fours, torch.full((len(fours),), 2)).view(len(score), -1)[:, :width]


@dataclass(frozen=True, kw_only=True)
class RoundedEntries(Entries):
    """Decoded tokens read weights that are rounded, and prompts the weights as they are.

    A control that is like a pruner in this: with `--ffn-bits` prompts run on rounded weights, too.
    """

    name = "rounded"
    summary = "reads rounded weights while it decodes, and for prompts the weights as they are"
    granularity = LAST_BITS
    bits: Literal["3", "4", "5", "6", "8", "q3_k", "q4_k", "q5_k"] = option(
        "q4_k", "what they are rounded to, as `--ffn-bits` takes it"
    )

    @property
    def sized(self) -> bool:  # type: ignore[override]
        return False

    @property
    def _rounding(self) -> Rounding:
        found = parse(self.bits)
        assert found is not None
        return found

    def check(self, bits: Stored) -> None:
        if bits.code != OWN_BITS:
            raise UserError(
                f"what is rounded are 16-bit weights, and these have {bits.total:.3g} bits",
                "leave --ffn-bits out, or load the model unquantised",
            )

    def read(self, densities: float, bits: Stored, weight: Tensor) -> float:
        self.check(bits)
        return self._rounding.weight_bits(weight.shape[1]) / OWN_BITS

    def values(self, weight: Tensor, inputs: Inputs) -> Tensor:
        from dart_eval.weights.rounding import rounded

        return rounded(weight, self._rounding).values.to(weight.dtype)


ENTRIES = (Above, ByNorms, WandaEntries, RoundedEntries)
