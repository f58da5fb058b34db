"""Allocations: how the sparsity is spread over layers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dart_eval.pruning.part import Part, option
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import check_name, read_text, write

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.masks.change import ChangeState

SHIPPED = Path(__file__).parents[2] / "data" / "keep-tables.json"
TABLE_TOLERANCE = 0.005  # of the mean density: published tables are rounded to four digits


@dataclass(frozen=True, kw_only=True)
class Allocation(Part):
    """Base of all allocations.

    Attributes:
        needs_change: whether it depends on how much each FFN changes the stream in the context (`ChangeState`).
        needs_scores: whether it depends on the scores of the neurons.
        by_layer: whether FFNs of one decoder layer have one density, such as shared and routed experts.
    """

    slot = "allocation"
    by_layer: ClassVar[bool] = False
    needs_change: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def densities(
        self, sparsity: float, sizes: Sequence[int], change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        """Return [L] the share of each layer's weights that is read, with mean 1 - sparsity over all neurons.

        Args:
            sizes: [L] neurons of each layer.
            change: the context's changes, if `needs_change`.
            rows: the sequences that decide, together.
            scores: per layer [F], of these sequences, if `needs_scores`.
        """
        raise NotImplementedError

    def sizes(self, ffns: Sequence[FFN]) -> dict[int, int]:
        """Return the neurons of what has a density: of FFNs by their index, or of layers by their number."""
        found: dict[int, int] = {}
        for ffn in ffns:
            found[self._place(ffn)] = found.get(self._place(ffn), 0) + ffn.size
        return found

    def of_ffns(
        self, sparsity: float, ffns: Sequence[FFN], change: ChangeState | None = None, rows: slice = slice(None),
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        """Return the density of each FFN: see `densities`."""
        sizes = self.sizes(ffns)
        found = dict(zip(sizes, self.densities(sparsity, [*sizes.values()], change, rows, scores), strict=True))
        return [found[self._place(ffn)] for ffn in ffns]

    def _place(self, ffn: FFN) -> int:
        return ffn.number if self.by_layer else ffn.layer

    def start(self, batch: int, ffns: Sequence[FFN]) -> ChangeState | None:
        """Return the state of new sequences; None if it needs none."""
        return None

    def check_sparsity(self, sparsity: float, sizes: Sequence[int] | None = None) -> None:
        """Refuse a sparsity or layers that it does not support. sizes: [L] their neurons; None: not known yet."""


@dataclass(frozen=True, kw_only=True)
class ByShares(Allocation):
    """Base of allocations that depend on the sparsity and the number of layers alone."""


@dataclass(frozen=True, kw_only=True)
class Uniform(ByShares):
    """Every layer has the same density."""

    name = "uniform"
    summary = "gives every layer the same density"

    def densities(self, sparsity: float, sizes: Sequence[int], *_: object) -> list[float]:
        return [1 - sparsity] * len(sizes)


@dataclass(frozen=True, kw_only=True)
class Global(Allocation):
    """All neurons stand in one ranking, by z = (score - mean) / standard deviation, both of the neuron's own layer.

    FLAP's AL-MM (arXiv 2312.11983; CASIA-IVA-Lab/FLAP, 3bb57db, `lib/prune.py`), with the unbiased deviation as there.
    Exactly k neurons are kept, where the code cuts at a threshold, and every layer keeps its best one, where the code
    may leave none. The z of a score is that of the score's own formula (of `activation`, of its sum of squares).
    """

    name = "global"
    summary = "ranks the neurons of all layers together, by score standardised over the layer"
    fits_experts = False
    needs_scores = True

    def densities(
        self, sparsity: float, sizes: Sequence[int], change: ChangeState | None, rows: slice,
        scores: Sequence[Tensor] | None = None,
    ) -> list[float]:  # fmt: skip
        import torch

        from dart_eval.kernels.top import top_k_mask

        assert scores is not None
        sizes = [len(s) for s in scores]
        budget, standard = round((1 - sparsity) * sum(sizes)), [_standardised(s) for s in scores]
        if budget >= len(sizes):
            for z in standard:
                z[z.argmax()] = torch.inf
        chosen = top_k_mask(torch.cat(standard)[None], torch.tensor([budget]))[0]
        return [int(part.sum()) / len(part) for part in chosen.split(sizes)]


def _standardised(score: Tensor) -> Tensor:
    """[F] fp64 on the CPU: distances from the mean in standard deviations; 0 where all are the same."""
    import torch

    if score.is_meta:  # a model without weights
        return score.new_zeros(len(score), dtype=torch.float64, device="cpu")
    x = score.cpu().double()
    deviation = x.std() if len(x) > 1 else x.new_zeros(())
    return (x - x.mean()) / deviation if bool(deviation > 0) else x * 0


@dataclass(frozen=True, kw_only=True)
class FromTable(ByShares):
    """The densities come from a file, or are those of a shipped table."""

    name = "table"
    summary = (
        "reads the densities from a file (`dart-eval trace --save-allocation` writes one), or takes a shipped table"
    )
    file: str = option("", "name of the file or of a shipped table, such as llama-3.1-8b-70")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.file:
            raise UserError("allocation=table needs a file", "for example allocation=table:allocation.file=FILE")
        check_name(self.file, "allocation table")
        shipped, is_file = self.file in shipped_tables(), Path(self.file).is_file()
        if shipped and is_file:
            raise UserError(
                f"{self.file} is a shipped allocation table, and a file in this folder",
                f"write ./{self.file} for the file, or rename it to take the shipped table",
            )
        if not shipped and not is_file:
            known = nearest(self.file, shipped_tables())
            remedy = "write one with `dart-eval trace --save-allocation FILE`"
            raise UserError(f"allocation table {self.file} is not a file", known or remedy)
        _ = self.table  # read now, so that a bad file fails early

    @functools.cached_property
    def table(self) -> list[float]:
        """[L] densities."""
        return self._read[0]

    @functools.cached_property
    def _read(self) -> tuple[list[float], list[int] | None]:
        shipped = shipped_tables().get(self.file)
        return (shipped, None) if shipped else read_table(self.file)

    def contents(self) -> list[bytes]:
        shipped = shipped_tables().get(self.file)
        return [json.dumps(shipped).encode() if shipped else Path(self.file).read_bytes()]

    def densities(self, sparsity: float, sizes: Sequence[int], *_: object) -> list[float]:
        self.check_sparsity(sparsity, sizes)
        return self.table

    def check_sparsity(self, sparsity: float, sizes: Sequence[int] | None = None) -> None:
        """Refuse a table for another sparsity or, if the neurons of the model's layers are known, for another model."""
        ratios, own = self._read  # own: neurons of the layers that it was made for; None: all alike
        if sizes is not None and len(ratios) != len(sizes):
            raise UserError(
                f"the allocation table has {len(ratios)} layers, the model {len(sizes)}", "make one for this model"
            )
        weights = sizes or own or [1] * len(ratios)
        mean = sum(r * n for r, n in zip(ratios, weights, strict=True)) / sum(weights)
        if abs(mean - (1 - sparsity)) > TABLE_TOLERANCE:
            raise UserError(
                f"the allocation table keeps {mean:.3f} of the neurons, sparsity {sparsity:g} keeps {1 - sparsity:.3f}",
                f"run it at --sparsity {1 - mean:.3g}, or make a table for {sparsity:g}",
            )


@functools.cache
def shipped_tables() -> dict[str, list[float]]:
    """Return the tables that DART's public code ships, by name: model, sparsity in per cent, and ablation."""
    tables = json.loads(SHIPPED.read_text(encoding="utf-8"))["tables"]
    return {name: table["keep"] for name, table in tables.items()}


def read_table(path: str | Path) -> tuple[list[float], list[int] | None]:
    """Read the densities of a saved allocation (`write_table`), [L], and the neurons of its layers if it has them.

    Raises:
        UserError: the file cannot be read or holds no ratios.
    """
    remedy = "write one with `dart-eval trace --save-allocation FILE`"
    try:
        data = json.loads(read_text(path, "allocation table", remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"allocation table {path} cannot be read ({error})", remedy) from None
    ratios = data.get("keep") if isinstance(data, dict) else None
    if (
        not isinstance(ratios, list)
        or not ratios
        or not all(isinstance(r, (int, float)) and 0 <= r <= 1 for r in ratios)
    ):
        raise UserError(f"{path} is no allocation table: it needs `keep`, a list of ratios in [0, 1]", remedy)
    sizes = data.get("sizes")
    if sizes is not None and not (
        isinstance(sizes, list) and len(sizes) == len(ratios) and all(isinstance(n, int) and n > 0 for n in sizes)
    ):
        raise UserError(f"{path} is no allocation table: its `sizes` are not the neurons of its layers", remedy)
    return [float(r) for r in ratios], sizes


def write_table(path: str | Path, ratios: Sequence[float], **about: object) -> None:
    """Save densities and their origin, for `allocation=table:allocation.file=FILE`.

    Layers of different sizes need `sizes=`, their neurons: the densities' mean is over neurons.
    """
    text = json.dumps({**about, "keep": [round(float(r), 6) for r in ratios]}, indent=1) + "\n"
    write(path, text)
