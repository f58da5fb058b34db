"""Allocations: how the sparsity is spread over layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dart_eval.pruning.masks.counts import check_table, depth_aware, normalise_sensitivity, read_table
from dart_eval.pruning.part import Part, option
from dart_eval.pruning.session.sequence import PerSequence
from dart_eval.util.errors import UserError
from dart_eval.util.files import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Allocation(Part):
    """Base of all allocations.

    Attributes:
        needs_change: it follows from how much each FFN changes the stream on the context's tokens (`Change`).
        needs_scores: it follows from the scores of the neurons.
    """

    slot = "allocation"
    needs_change: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        """[L] share of the weights of each layer that is read; their mean is 1 - sparsity.

        Args:
            change: of the context, where `needs_change`. rows: the sequences of it to go by, together.
            scores: per layer [F], of these sequences, where `needs_scores`.
        """
        raise NotImplementedError

    def start(self, batch: int, ffns: Sequence[FFN]) -> ChangeState | None:
        """The state of new sequences; None where none is needed."""
        return None

    def check(self, sparsity: float, layers: int | None = None) -> None:
        """Refuse a sparsity, or a model of so many layers, that it was not made for."""


@dataclass(frozen=True, kw_only=True)
class ByShares(Allocation):
    """Base of allocations that follow from the sparsity and the number of layers alone."""


@dataclass(frozen=True, kw_only=True)
class Uniform(ByShares):
    """Every layer has the same density."""

    name = "uniform"
    summary = "gives every layer the same density"

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        return [1 - sparsity] * layers


@dataclass(frozen=True, kw_only=True)
class DepthAware(Allocation):
    """Layers that change the stream most keep most; early and late ones are spared (arXiv 2601.22632)."""

    name = "depth"
    summary = "keeps most in the layers that change the stream most, and spares early and late ones"
    needs_context = True
    needs_change = True
    sensitivity: Literal["ffn", "residual"] = option(
        "ffn", "judge a layer by what its FFN adds to the stream, or by the stream after it"
    )
    protect: bool = option(True, "spare early and late layers (off: the paper's ablation)")
    magnitude: bool = option(
        True, "weigh a layer's turn of the stream by the size of the change (off: the paper's ablation)"
    )

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        assert change is not None
        found = dict(zip(change.numbers, change.sensitivity(rows, self.magnitude), strict=True))
        sizes = dict.fromkeys(found, 0)  # FFNs of one layer change the stream together, and have one density
        for number, size in zip(change.numbers, change.sizes, strict=True):
            sizes[number] += size
        normalised = normalise_sensitivity([*found.values()])
        densities = depth_aware(normalised, sparsity, self.protect, [*sizes.values()])
        of_layer = dict(zip(found, densities, strict=True))
        return [of_layer[number] for number in change.numbers]

    def start(self, batch: int, ffns: Sequence[FFN]) -> ChangeState | None:
        return ChangeState(batch, ffns, self.sensitivity == "residual")

    def flops_per_token(self, shape: ModelShape) -> float:
        return shape.layers * 8 * shape.width  # two norms, a difference, its norm, a dot product


@dataclass(frozen=True, kw_only=True)
class Ends(ByShares):
    """The first and the last layers stay dense, and the others share the sparsity evenly.

    With first=6 and last=5 on 32 layers it is that of CoreInfer's code (arXiv 2410.18311, commit 38de332: layers 6 to
    26), with first=3 and last=0 that of Probe Pruning's (arXiv 2502.15618, commit acc0730). The former takes the
    sparsity for that of the pruned layers, the latter rounds theirs to two digits; here it is that of all layers, and
    is met exactly.
    """

    name = "ends"
    summary = "keeps the first and the last layers dense, and gives all others the same density"
    first: int = option(1, "layers at the beginning that stay dense", least=0)
    last: int = option(1, "layers at the end that stay dense", least=0)

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        self.check(sparsity, layers)
        pruned = layers - self.first - self.last
        density = 1 - sparsity * layers / pruned if pruned > 0 else 1.0
        return [1.0] * min(self.first, layers) + [density] * pruned + [1.0] * min(self.last, layers - self.first)

    def check(self, sparsity: float, layers: int | None = None) -> None:
        if layers is None or not sparsity:
            return
        most = max(0, layers - self.first - self.last) / layers
        if sparsity > most + 1e-9:
            raise UserError(
                f"{self.title} leaves {max(0, layers - self.first - self.last)} of {layers} layers to be pruned, "
                f"which sparsity {sparsity:g} is too much for",
                f"use a sparsity up to {math.floor(100 * most) / 100:g}, or a smaller allocation.first or .last",
            )


@dataclass(frozen=True, kw_only=True)
class Global(Allocation):
    """All neurons stand in one ranking, by z = (score - mean) / standard deviation, both of the neuron's own layer.

    FLAP's AL-MM (arXiv 2312.11983; CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`), with the unbiased deviation as there.
    Exactly k neurons are kept, where the code cuts at a threshold, and every layer keeps its best one, where the code
    may leave none. The z of a score is that of the score's own formula (of `activation`, of its sum of squares).
    """

    name = "global"
    summary = "ranks all neurons together, by how far each one's score is above its layer's mean"
    fits_experts = False
    needs_scores = True

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        import torch

        from dart_eval.kernels.top import top_k_mask

        assert scores is not None
        sizes = [len(s) for s in scores]
        kept, standard = round((1 - sparsity) * sum(sizes)), [_standardised(s) for s in scores]
        if kept >= len(sizes):
            for z in standard:
                z[z.argmax()] = torch.inf
        chosen = top_k_mask(torch.cat(standard)[None], torch.tensor([kept]))[0]
        return [int(part.sum()) / len(part) for part in chosen.split(sizes)]


def _standardised(score: Tensor) -> Tensor:
    """[F] fp64 on the CPU: distances from the mean in standard deviations; 0 where all are the same."""
    import torch

    if score.is_meta:  # of a model without weights nothing is known
        return score.new_zeros(len(score), dtype=torch.float64, device="cpu")
    x = score.cpu().double()
    deviation = x.std() if len(x) > 1 else x.new_zeros(())
    return (x - x.mean()) / deviation if bool(deviation > 0) else x * 0


@dataclass(frozen=True, kw_only=True)
class Table(ByShares):
    """The densities stand in a file."""

    name = "table"
    summary = "takes the densities of a file (`dart-eval trace --save-allocation` writes one)"
    file: str = option("", "the name of the file")

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "write one with `dart-eval trace --save-allocation FILE`"
        if not self.file:
            raise UserError("allocation=table needs a file", "for example allocation=table:allocation.file=FILE")
        check_name(self.file, "allocation table")
        if not Path(self.file).is_file():
            raise UserError(f"allocation table {self.file} is not a file", remedy)
        _ = self.table  # read now: a bad file is no surprise for later

    @functools.cached_property
    def table(self) -> list[float]:
        """[L] densities of the file."""
        return read_table(self.file)

    def files(self) -> list[str]:
        return [self.file]

    def densities(
        self, sparsity: float, layers: int, change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        self.check(sparsity, layers)
        return self.table

    def check(self, sparsity: float, layers: int | None = None) -> None:
        check_table(self.table, sparsity, layers)


ALLOCATIONS = (Uniform, DepthAware, Ends, Global, Table)


class ChangeState(PerSequence):
    """How much each layer's FFN changes the residual stream, summed over the context's tokens of B sequences.

    Attributes:
        numbers, sizes: of each FFN its decoder layer, and its neurons.
    """

    def __init__(self, batch: int, ffns: Sequence[FFN], residual: bool) -> None:
        import torch

        layers, self.residual = len(ffns), residual
        self.numbers, self.sizes = tuple(f.number for f in ffns), tuple(f.size for f in ffns)
        self.tokens = torch.zeros(batch)
        self.cosine = torch.zeros(batch, layers)  # sum over tokens of cos(y, z), on the CPU
        self.change = torch.zeros(batch, layers)  # sum over tokens of ||z - y|| / ||y||

    def observe(self, layer: int, y: Tensor, added: Tensor, valid: Tensor) -> None:
        """Count a layer's tokens. y: the stream that enters the FFN, added: what the FFN adds, both [B, T, D]."""
        import torch
        from torch.nn.functional import cosine_similarity

        y, z, valid = y.float(), added.float(), valid.to(y.device)
        if self.residual:
            z = y + z
        cosine = cosine_similarity(y, z, dim=-1)
        change = (z - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)
        self.cosine[:, layer] += torch.where(valid, cosine, 0).sum(1).cpu()
        self.change[:, layer] += torch.where(valid, change, 0).sum(1).cpu()

    def finish(self, valid: Tensor) -> None:
        """Close a context forward whose real tokens were `valid` ([B, T] bool)."""
        self.tokens += valid.sum(1).cpu()

    def sensitivity(self, rows: slice, magnitude: bool = True) -> list[float]:
        """S_l = (1 - mean cos(y, z)) * mean(||z - y|| / ||y||) of every layer, over the tokens of these sequences.

        Without `magnitude` the first factor alone.
        """
        n = max(float(self.tokens[rows].sum()), 1.0)
        turn = 1 - self.cosine[rows].sum(0) / n
        return (turn * (self.change[rows].sum(0) / n) if magnitude else turn).tolist()
