"""A pruning method: its parts, and what follows from them. The kinds of methods stand in `kinds.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dart_eval.pruning.choices.choice import All, Choice
from dart_eval.pruning.masks.allocations import Allocation, Uniform
from dart_eval.pruning.masks.compensations import Compensation, Nothing
from dart_eval.pruning.masks.counts import Counts, in_steps, keep_counts
from dart_eval.pruning.masks.mask import Everything, Mask
from dart_eval.pruning.part import Part, check_slots
from dart_eval.pruning.spelling import changed_settings, plain_fields, slots, text_of
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.inputs.attached import AttachedInputs, SwappedWeights
    from dart_eval.pruning.inputs.entries import Entries
    from dart_eval.pruning.inputs.graded import GradedInputs
    from dart_eval.util.bits import Stored

    Beside = AttachedInputs | GradedInputs | SwappedWeights

CostTerms = tuple[float, float, float, float]  # read per neuron: always, if in the mask, if taken, if written


KINDS: dict[type[Part], type[Pruner]] = {}  # a part -> the kind of methods that it makes, see `kinds`


@dataclass(frozen=True)
class Pruner:
    """A pruning method. `Pruner(...)` returns the kind that its parts belong to.

    Attributes:
        mask: which neurons a sequence may use.
        choice: which neurons a token computes, where the mask holds all.
        allocation: how the sparsity is spread over layers.
        compensation: what replaces the output of pruned neurons.
        leaves_out: what methods of this kind leave out.
        name: the name that a user types and tables show. Not compared, like the next three.
        summary: one line for `dart-eval ls methods`.
        paper: arXiv number.
        base: the method that this one was derived from.
    """

    mask: ClassVar[Mask] = Everything()
    choice: ClassVar[Choice] = All()
    allocation: ClassVar[Allocation] = Uniform()
    compensation: ClassVar[Compensation] = Nothing()
    leaves_out: ClassVar[str] = "neurons"
    name: str = dataclasses.field(default="custom", compare=False, kw_only=True)
    summary: str = dataclasses.field(default="", compare=False, kw_only=True)
    paper: str = dataclasses.field(default="", compare=False, kw_only=True)
    base: Pruner | None = dataclasses.field(default=None, compare=False, repr=False, kw_only=True)

    def __init_subclass__(cls, of: type[Part] | None = None) -> None:
        """Register the kind of methods for parts of the class `of`."""
        if of is not None:
            KINDS[of] = cls

    def __new__(cls, *parts: Part, **slots: object) -> Any:
        """Return an instance of the kind that the parts belong to; its `__init__` takes the arguments."""
        classes = [type(part) for part in (*parts, *slots.values()) if isinstance(part, Part)]
        return object.__new__(kind_of_parts(classes) if cls is Pruner else cls)

    def __post_init__(self) -> None:
        check_slots(self, self._title)
        choice = self.choice
        if choice.calibrates and self.allocation.needs_context:
            raise UserError(
                f"{choice.title} with a calibrated threshold chooses as many neurons for every prompt",
                "use allocation=uniform, or choice.threshold=none",
            )

    @property
    def other(self) -> Entries | None:
        """The part that leaves out inputs or weights; None for methods that leave out neurons."""
        return None

    @property
    def granularity(self) -> str:
        """What is left out, if not whole neurons."""
        return "" if self.other is None else self.other.granularity

    @property
    def _title(self) -> str:
        """The method in messages: the part that decides its kind."""
        return (self.other or self.mask).title

    @property
    def prunes(self) -> bool:
        """Whether anything is ever left out: the mask lacks neurons, or tokens choose."""
        return not self.mask.holds_all or self.choice.chooses

    @property
    def sized(self) -> bool:
        """Whether the sparsity decides how much is left out."""
        return self.prunes if self.other is None else self.other.sized

    @property
    def exact(self) -> bool:
        """Whether the sparsity sets the bytes that every token reads; if not, they are measured."""
        return self.choice.exact

    @property
    def by_token(self) -> bool:
        """Whether each token chooses what it reads, so that rounding errors decide near-ties."""
        return self.choice.chooses

    @property
    def looks_ahead(self) -> bool:
        """Whether masks are made from the very tokens that run under them."""
        return self.mask.looks_ahead

    @property
    def upper_bound(self) -> bool:
        """Whether it uses information that no method has in time."""
        return self.mask.looks_ahead or any(part.upper_bound for part in self.parts())

    @property
    def needs_context(self) -> bool:
        """Whether a sequence without a context runs dense."""
        return self.mask.needs_context or self.allocation.needs_context

    @property
    def calibrates(self) -> bool:
        """Whether it needs a calibration text."""
        static = self.mask.fixed and self.mask.score is not None and self.mask.score.observes
        return static or any(part.calibrates for part in self.parts())

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps state per sequence."""
        return not self.mask.fixed or self.allocation.needs_change

    @property
    def reads_most(self) -> bool:
        """Whether a high sparsity may be out of reach, since whole matrices are read before the choice."""
        return bool(self.choice.reads_whole)

    def check_reach(self, sparsity: float, sizes: Sequence[int], width: int, matrices: int) -> None:
        """Refuse a sparsity that leaves fewer bytes than are read before the choice.

        Args:
            sizes: [L] neurons per layer.
            width: D of the model.
            matrices: 3 for gated FFNs, 2 for plain ones.

        Raises:
            UserError: names the highest possible sparsity.
        """
        if self.reads_most:
            self.choice.counts([1.0 - sparsity] * len(sizes), sizes, sparsity, matrices)

    def counts(self, densities: Sequence[float], ffns: Sequence[FFN], sparsity: float) -> Counts:
        """Return the neurons per layer: in the mask, taken by a token, and written by it.

        Args:
            densities: [L] share of each layer's weights that is read.
        """
        sizes = [f.size for f in ffns]
        if self.mask.holds_all:
            return self.choice.counts(densities, sizes, sparsity, ffns[0].matrices)
        keep = keep_counts(densities, sizes, sparsity)
        if any(f.routed for f in ffns):  # equally many neurons of each expert
            keep = in_steps(keep, sizes, [f.routed.count if f.routed else 1 for f in ffns])
        return Counts(keep, keep, keep)

    def cost_terms(self, ffns: Sequence[FFN], sparsity: float, unit: float, full_matrices: float) -> list[CostTerms]:
        """Return per layer the read cost of a neuron, in rows of an average matrix.

        Args:
            unit: mean bits of an FFN weight.
            full_matrices: matrices that are read whole before the choice.
        """
        from dart_eval.weights import rounding

        matrices, full, terms = ffns[0].matrices, full_matrices if sparsity else 0.0, []
        for into, down, scales in map(rounding.rows, ffns):
            into, down, scales = into / unit, down / unit, scales / unit
            terms.append((scales, into * full, into * (matrices - 1 - full), down - scales))
        return terms

    def check_weights(self, ffns: Sequence[FFN]) -> None:
        """Refuse weights that it does not support.

        Raises:
            UserError: with the reason.
        """

    def check_bits(self, bits: Stored) -> None:
        """Refuse weights of these bits, before a model is loaded."""
        if self.other is not None:
            self.other.check_bits(bits)

    def scales_read(self, ffns: Sequence[FFN]) -> float:
        """Return the share of the weight bytes that every token of `other` reads beside its weights: their scales."""
        return 0.0

    def beside(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> Beside | None:
        """Attach the part that leaves out inputs or weights to a model; None for other methods."""
        return None

    def parts(self) -> list[Part]:
        """All parts of the method, with those inside other parts."""
        return [part for _, part in slots(self)]

    def contents(self) -> list[bytes]:
        """The contents of the files that its parts read."""
        return [content for part in self.parts() for content in part.contents()]

    @property
    def spec(self) -> str:
        """The spelling that a user types: the name, and every setting that differs from the method of that name."""
        base = self.base or (Pruner() if self.name == Pruner.name else self)
        return ":".join([self.name, *(f"{path}={text_of(value)}" for path, value in changed_settings(self, base))])

    def params(self) -> dict[str, object]:
        """Return every part and field by the path that a user types: `{"remask": "drift", "remask.window": 8}`."""
        params: dict[str, object] = {}
        for path, part in slots(self):
            params[path] = part.name
            for field in plain_fields(type(part)):
                params[f"{path}.{field.name}"] = getattr(part, field.name)
        return params


def kind_of_parts(parts: Sequence[type[Part]], default: type[Pruner] | None = None) -> type[Pruner]:
    """Return the kind of method that these parts make. default: the kind if no part decides; None: `TokenChoice`."""
    kinds = (kind for part in parts for of, kind in KINDS.items() if issubclass(part, of))
    return next(kinds, default or KINDS[Everything])
