"""A pruning method: its parts, and what follows from them. The kinds of methods stand in `kinds.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dart_eval.pruning.choices.choice import All, AnyChoice
from dart_eval.pruning.masks.allocations import Allocation, Uniform
from dart_eval.pruning.masks.compensations import Compensation, Nothing
from dart_eval.pruning.masks.counts import Budget, Counts, ReadCost
from dart_eval.pruning.masks.mask import Everything, Mask
from dart_eval.pruning.part import Part, check_slots
from dart_eval.pruning.spelling import plain_fields, slots, text_of, told
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.layers.ffn import FFN
    from dart_eval.pruning.calibration.calibration import Calibration
    from dart_eval.pruning.experts.rerouted import Rerouted
    from dart_eval.pruning.inputs.attached import AttachedInputs

Paid = tuple[float, float, float, float]  # what is read of each neuron, and besides if masked, taken, written


KINDS: dict[type[Part], type[Pruner]] = {}  # a part -> the kind of methods that it makes, see `kinds`


@dataclass(frozen=True)
class Pruner:
    """A pruning method. `Pruner(...)` makes the kind that its parts are of.

    Attributes:
        mask: which neurons a sequence may use.
        choice: which of them a token computes.
        allocation: how the sparsity is spread over layers.
        compensation: what stands in for what is left out.
        leaves_out: what a method of its kind leaves out. granularity: the same, where it stands apart from neurons.
        name: what a user types, and tables show. summary: one line for `dart-eval ls methods`. paper: its
            number on arXiv. base: the method that this one was changed from. None of these counts when two methods are
            compared.
    """

    mask: ClassVar[Mask] = Everything()
    choice: ClassVar[AnyChoice] = All()
    allocation: ClassVar[Allocation] = Uniform()
    compensation: ClassVar[Compensation] = Nothing()
    leaves_out: ClassVar[str] = "neurons"
    granularity: ClassVar[str] = ""
    name: str = dataclasses.field(default="custom", compare=False, kw_only=True)
    summary: str = dataclasses.field(default="", compare=False, kw_only=True)
    paper: str = dataclasses.field(default="", compare=False, kw_only=True)
    base: Pruner | None = dataclasses.field(default=None, compare=False, repr=False, kw_only=True)

    def __init_subclass__(cls, of: type[Part] | None = None) -> None:
        """Of a kind that parts of this class make."""
        if of is not None:
            KINDS[of] = cls

    def __new__(cls, *parts: Part, **slots: Any) -> Any:
        """Of the kind that the parts are of. Its own `__init__` then takes the arguments."""
        given = [type(part) for part in (*parts, *slots.values()) if isinstance(part, Part)]
        return object.__new__(kind_of_parts(given) if cls is Pruner else cls)

    def __post_init__(self) -> None:
        check_slots(self, self._title)
        if (
            self.choice.calibrates
            and not self.choice.exact
            and (not self.mask.holds_all or self.allocation.needs_context)
        ):
            raise UserError(
                f"{self.choice.title} with a calibrated threshold chooses among all neurons, as many for every prompt",
                "use mask=everything and allocation=uniform, or choice.threshold=none",
            )

    @property
    def other(self) -> Part | None:
        """The part that leaves out something else than neurons; None: no part does."""
        return None

    @property
    def _title(self) -> str:
        """What messages call it, by the part that says of which kind it is."""
        return (self.other or self.mask).title

    @property
    def prunes(self) -> bool:
        """Whether anything is ever left out. Nothing is if the mask holds everything and tokens compute all of it."""
        return not self.mask.holds_all or self.choice.chooses

    @property
    def sized(self) -> bool:
        """Whether the sparsity decides how much is left out."""
        return self.prunes and (self.choice.sized or not self.mask.holds_all)

    @property
    def exact(self) -> bool:
        """Whether the sparsity decides what every token reads; if not, it is measured."""
        return self.choice.exact

    @property
    def by_token(self) -> bool:
        """Whether each token decides what it reads: a last digit then decides near-ties."""
        return self.choice.chooses

    @property
    def looks_ahead(self) -> bool:
        """Whether masks are made from the tokens that they are used on."""
        return self.mask.looks_ahead

    @property
    def upper_bound(self) -> bool:
        """Whether it uses what no method can know in time, so that no method can reach it."""
        return self.mask.looks_ahead or self.choice.upper_bound

    @property
    def needs_context(self) -> bool:
        """Whether a sequence must have a context to be pruned; without one it runs dense."""
        return self.mask.needs_context or self.allocation.needs_context

    @property
    def calibrates(self) -> bool:
        """Whether it asks for a calibration text."""
        static = self.mask.fixed and self.mask.score is not None and self.mask.score.observes
        return static or any(part.calibrates for part in self.parts())

    @functools.cached_property
    def observers(self) -> tuple[Part, ...]:
        """The parts that keep sums over the tokens of a context."""
        score = None if self.mask.fixed else self.mask.score
        return tuple(p for p in (score, self.choice, self.compensation) if p is not None and p.observes)

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps any state for a single sequence."""
        return not self.mask.fixed or bool(self.observers) or self.allocation.needs_change

    @property
    def reads_most(self) -> bool:
        """Whether a high sparsity may be out of reach: whole matrices are read before anything is chosen."""
        holds_all = self.mask.holds_all and bool(self.choice.reads_whole or self.choice.previews)
        return holds_all or self.choice.ranks

    def check_reach(self, sparsity: float, sizes: Sequence[int], width: int, matrices: int, bits: Stored) -> None:
        """Refuse a sparsity that leaves fewer bytes than are read before anything is chosen.

        Args:
            sizes: [L] neurons of every layer. width: of the model. matrices: 3 for gated FFNs and 2 for plain ones.
            bits: of a weight, as it is served.

        Raises:
            UserError: with the highest sparsity that can be met.
        """
        if not self.reads_most:
            return
        choice = self.at(1 - sparsity, bits.total).choice
        prices = choice.prices_of(sizes, width, matrices, bits)
        choice.counts(Budget([1.0 - sparsity] * len(sizes), sizes, sparsity, matrices, True, prices))

    def counts(
        self, densities: Sequence[float], ffns: Sequence[FFN], sparsity: float, prices: ReadCost | None
    ) -> Counts:
        """Neurons of each layer in the mask, those that a token takes, and those that it writes.

        densities: [L] share of each layer's weights that is read. prices: of a neuron, where there is a preview.
        """
        sizes, holds_all = [f.size for f in ffns], self.mask.holds_all
        counts = self.choice.counts(Budget(densities, sizes, sparsity, ffns[0].matrices, holds_all, prices))
        if holds_all or not any(f.routed for f in ffns):
            return counts
        return counts.in_steps(sizes, [f.routed.count if f.routed else 1 for f in ffns])

    def paid(self, ffns: Sequence[FFN], sparsity: float, unit: float, whole: float) -> list[Paid]:
        """Per layer what is read of each neuron, and besides of each in the mask, taken and written.

        In rows of a mean matrix.

        Args:
            unit: bits of an FFN weight, on average. whole: matrices of which a token reads the rows of the whole mask
                before it chooses.
        """
        from dart_eval.weights import rounding

        matrices, whole, found = ffns[0].matrices, whole if sparsity else 0.0, []
        for into, down, scales in map(rounding.rows, ffns):
            into, down, scales = into / unit, down / unit, scales / unit
            found.append((scales, into * whole, into * (matrices - 1 - whole), down - scales))
        return found

    def check_ffns(self, ffns: Sequence[FFN], sparsity: float) -> None:
        """Refuse FFNs and a sparsity that methods of its kind do not fit.

        Raises:
            UserError: with the reason.
        """

    def check_weights(self, ffns: Sequence[FFN], sparsity: float) -> None:
        """Refuse weights that it is not made for.

        Raises:
            UserError: with the reason.
        """
        self.choice.check_weights(ffns, sparsity)

    def check_bits(self, bits: Stored) -> None:
        """The same from the bits of a weight, as it is served, before a model is there."""

    def beside(
        self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None
    ) -> AttachedInputs | Rerouted | None:
        """What leaves out something else than neurons, at work on a model; None: nothing does."""
        return None

    def at(self, read: float, bits: float = OWN_BITS) -> Pruner:
        """The method where so large a share of the weight bytes is read: what goes by that is settled.

        Args:
            bits: of a weight as it is served. Nothing is to be settled where there are fewer than 16.
        """
        choice = self.choice.at(read) if bits == OWN_BITS else self.choice
        return self if choice is self.choice else dataclasses.replace(self, choice=choice, base=self.base or self)  # type: ignore[call-arg]

    def parts(self) -> list[Part]:
        """All parts of the method, the inner ones too."""
        return [part for _, part in slots(self)]

    def files(self) -> list[str]:
        """The files that its parts read."""
        return [file for part in self.parts() for file in part.files()]

    @property
    def spec(self) -> str:
        """What a user types to get it: the name, and every setting in which it differs from the method of that name."""
        base = self.base or (Pruner() if self.name == Pruner.name else self)
        return ":".join([self.name, *(f"{path}={text_of(value)}" for path, value in told(self, base))])

    def params(self) -> dict[str, Any]:
        """Every part and its fields, by the paths that a user types: `{"remask": "drift", "remask.window": 8}`."""
        found: dict[str, Any] = {}
        for path, part in slots(self):
            found[path] = part.name
            for field in plain_fields(type(part)):
                found[f"{path}.{field.name}"] = getattr(part, field.name)
        return found


def kind_of_parts(parts: Sequence[type[Part]], usual: type[Pruner] | None = None) -> type[Pruner]:
    """The kind of method that these parts make. usual: where none of them says; None: a choice among all neurons."""
    found = (kind for part in parts for of, kind in KINDS.items() if issubclass(part, of))
    return next(found, usual or KINDS[Everything])
