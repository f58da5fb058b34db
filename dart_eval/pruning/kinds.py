"""Pruning methods: what each kind is made of. A combination that makes no sense cannot be written down.

| kind | made of |
| --- | --- |
| `NeuronMask` | a mask for each sequence (score, draw, re-mask) x allocation |
| `StaticMask` | one mask for all (score) x an allocation that needs no prompt x compensation |
| `TokenChoice` | a choice among all neurons x an allocation that needs no scores |
| `InputSparsity` | inputs, or bits of weights, that are skipped x an allocation that needs no prompt |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import All, Choice
from dart_eval.pruning.inputs.entries import Entries
from dart_eval.pruning.inputs.teal import Above
from dart_eval.pruning.masks.allocations import Allocation, ByShares, Global, Uniform
from dart_eval.pruning.masks.compensations import Compensation, Nothing
from dart_eval.pruning.masks.counts import Counts
from dart_eval.pruning.masks.depth import DepthAware
from dart_eval.pruning.masks.mask import Everything, FromPrompt, OfTokens, Static
from dart_eval.pruning.method import CostTerms, Pruner, kind_of_parts
from dart_eval.pruning.part import Part
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.method import Beside


@dataclass(frozen=True)
class NeuronMask(Pruner, of=OfTokens):
    """Each sequence has a mask of its own; every combination of its parts works."""

    mask: OfTokens = FromPrompt()  # type: ignore[misc]
    allocation: Allocation = Uniform()  # type: ignore[misc]


@dataclass(frozen=True)
class StaticMask(Pruner, of=Static):
    """All sequences have one mask, which is made before any prompt is seen."""

    mask: Static = Static()  # type: ignore[misc]
    allocation: ByShares | Global = Uniform()  # type: ignore[misc]
    compensation: Compensation = Nothing()  # type: ignore[misc]


@dataclass(frozen=True)
class TokenChoice(Pruner, of=Everything):
    """Each token chooses among all neurons; without a choice nothing is pruned."""

    mask: Everything = Everything()  # type: ignore[misc]
    choice: Choice = All()  # type: ignore[misc]
    allocation: ByShares | DepthAware = Uniform()  # type: ignore[misc]


@dataclass(frozen=True)
class InputSparsity(Pruner, of=Entries):
    """Each token skips some inputs of each matrix, or bits of its weights."""

    leaves_out = "inputs or weights"
    prunes = True
    allocation: ByShares = Uniform()  # type: ignore[misc]
    entries: Entries = Above()

    @property
    def other(self) -> Entries:
        return self.entries

    @property
    def exact(self) -> bool:
        return not self.entries.by_token

    @property
    def by_token(self) -> bool:
        return self.entries.by_token

    def check_weights(self, ffns: Sequence[FFN]) -> None:
        from dart_eval.weights.rounding import parameter_of, stored_of

        for module in (m for f in ffns for m in f.projections):
            self.entries.check_bits(stored_of(module))
            if not self.entries.by_token:  # the weights themselves are swapped
                parameter_of(module)

    def check_reach(self, sparsity: float, sizes: Sequence[int], width: int, matrices: int) -> None:
        for size in {*sizes} if sparsity else ():
            for rows, n in ((width, size), (size, width)):  # down, which has fewer rows, needs more beside its codes
                self.entries.check_read(1 - sparsity, rows, n)

    def counts(self, densities: Sequence[float], ffns: Sequence[FFN], sparsity: float) -> Counts:
        sizes = [f.size for f in ffns]
        return Counts(sizes, sizes, sizes)

    def cost_terms(self, ffns: Sequence[FFN], sparsity: float, unit: float, full_matrices: float) -> list[CostTerms]:
        from dart_eval.pruning.inputs import attached

        if self.sized and not sparsity:
            return super().cost_terms(ffns, sparsity, unit, full_matrices)
        densities = self.allocation.of_ffns(sparsity, ffns)
        share_read = attached.share_read(self.entries, ffns, densities, sparsity)
        return [(ffns[0].matrices * share_read, 0.0, 0.0, 0.0)] * len(ffns)

    def scales_read(self, ffns: Sequence[FFN]) -> float:
        from dart_eval.pruning.inputs.attached import scales_read

        return scales_read(ffns)

    def beside(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Beside | None:
        from dart_eval.pruning.inputs.attached import attach

        if self.sized and not sparsity:
            return None
        densities = self.allocation.of_ffns(sparsity, ffns)
        return attach(self.entries, ffns, densities, sparsity, calibration)


def kind_with(method: Pruner, parts: Sequence[type[Part]]) -> type[Pruner]:
    """Return the kind of a method with these parts in its slots.

    Raises:
        UserError: the method and these parts leave out different things.
    """
    kind, masks = kind_of_parts(parts, type(method)), (NeuronMask, StaticMask, TokenChoice)
    if isinstance(method, kind) or not method.prunes or (issubclass(kind, masks) and isinstance(method, masks)):
        return kind
    part = next(p for p in parts if kind_of_parts([p], type(method)) is kind)
    raise UserError(
        f"the method leaves out {method.leaves_out}, but {part.slot}={part.name} leaves out {kind.leaves_out}",
        f"begin from a method that leaves out nothing: dense:{part.slot}={part.name}",
    )
