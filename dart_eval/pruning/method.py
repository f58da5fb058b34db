"""A pruning method is a composition of parts. A spelling reaches every field of them.

Example: `griffin:remask=drift:remask.window=8` is GRIFFIN's composition with another part in the slot `remask`, and
another value in that part's field `window`. In Python it is `make("griffin", {"remask": OnDrift(window=8)})`, in YAML
`griffin: {remask: {part: drift, window: 8}}`. Nothing here knows a model or a task.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.pruning.choices.choice import All, Choice
from dart_eval.pruning.experts.routings import Own, Routing
from dart_eval.pruning.inputs.entries import AllEntries, Entries
from dart_eval.pruning.masks.allocations import Allocation, Uniform
from dart_eval.pruning.masks.compensations import Compensation, Nothing
from dart_eval.pruning.masks.mask import Everything, Mask
from dart_eval.pruning.part import Part, cast, kind_of, slot_of
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError, naming, nearest

OWNERS = {
    "score": "mask",
    "draw": "mask",
    "remask": "mask",
    "image": "choice",
}  # slots of parts, addressed by their names alone


@dataclass(frozen=True)
class Pruner:
    """A pruning method.

    Attributes:
        mask: which neurons a sequence may use.
        choice: which of them a token computes.
        allocation: how the sparsity is spread over layers.
        compensation: what stands in for what is left out.
        entries: which weights inside the matrices a token reads; a method leaves out these, or neurons.
        routing: which of its experts a token has; a method leaves out experts, or neurons.
        name: what a user types, and tables show. summary: one line for `dart-eval ls methods`. base: the
            method that this one was changed from. None of these counts when two methods are compared.
    """

    mask: Mask = Everything()
    choice: Choice = All()
    allocation: Allocation = Uniform()
    compensation: Compensation = Nothing()
    entries: Entries = AllEntries()
    routing: Routing = Own()
    name: str = dataclasses.field(default="custom", compare=False)
    summary: str = dataclasses.field(default="", compare=False)
    base: Pruner | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask.fixed and not self.mask.whole and self.allocation.needs_context:
            raise UserError(
                f"{self.allocation.title} looks at the prompt, and {self.mask.title} is made before it",
                "use allocation=uniform",
            )
        if self.allocation.needs_scores and self.mask.score is None:
            raise UserError(
                f"{self.allocation.title} goes by scores, and {self.mask.title} has none", "use allocation=uniform"
            )
        if not self.choice.exact and self.choice.calibrates and (not self.mask.whole or self.allocation.needs_context):
            raise UserError(
                f"{self.choice.title} with a calibrated threshold chooses among all neurons, as many for every prompt",
                "use mask=everything and allocation=uniform, or choice.threshold=none",
            )
        if self.entries.finer and (not self.mask.whole or self.choice.chooses or self.allocation.needs_context):
            raise UserError(
                f"{self.entries.title} leaves out {self.entries.granularity} of whole matrices, and no neurons",
                "use mask=everything, choice=none and allocation=uniform, or entries=all",
            )
        whole = self.mask.whole and not self.choice.chooses and not self.entries.finer
        if self.routing.reroutes and not (whole and self.allocation == Uniform()):
            raise UserError(
                f"{self.routing.title} leaves out experts, and no neurons of those that a token has",
                "use mask=everything, choice=none, entries=all and allocation=uniform, or routing=own",
            )
        if self.choice.ranks and self.mask.fixed:
            raise UserError(
                f"{self.choice.title} ranks neurons by the mask's score of a sequence, and {self.mask.title} has none",
                "use mask=prompt, or another choice",
            )

    @property
    def prunes(self) -> bool:
        """Whether anything is ever left out. Nothing is if the mask holds everything and tokens compute all of it."""
        return not self.mask.whole or self.choice.chooses or self.entries.finer or self.routing.reroutes

    @property
    def sized(self) -> bool:
        """Whether the sparsity decides how much is left out."""
        if self.routing.reroutes:
            return self.routing.sized
        return self.prunes and self.entries.sized and (self.choice.sized or not self.mask.whole)

    @property
    def exact(self) -> bool:
        """Whether the sparsity decides what every token reads; if not, it is measured."""
        return self.choice.exact and not self.entries.by_token

    @property
    def by_token(self) -> bool:
        """Whether each token decides what it reads: a last digit then decides near-ties."""
        return self.choice.chooses or self.entries.by_token

    @property
    def granularity(self) -> str:
        """What is left out, where it stands apart from neurons; else nothing."""
        return self.entries.granularity if self.entries.finer else self.routing.granularity

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
        whole = self.mask.whole and bool(self.choice.reads_whole or self.choice.previews)
        return whole or self.choice.ranks

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
        choice.counts([1.0 - sparsity] * len(sizes), sizes, sparsity, matrices, True, prices)

    def at(self, read: float, bits: float = OWN_BITS) -> Pruner:
        """The method where so large a share of the weight bytes is read: what goes by that is settled.

        Args:
            bits: of a weight as it is served. Nothing is to be settled where there are fewer than 16.
        """
        choice = self.choice.at(read) if bits == OWN_BITS else self.choice
        return self if choice is self.choice else dataclasses.replace(self, choice=choice, base=self.base or self)

    def parts(self) -> list[Part]:
        """All parts of the method, the inner ones too."""
        return [part for _, part in slots(self)]

    def files(self) -> list[str]:
        """The files that its parts read."""
        return [file for part in self.parts() for file in part.files()]

    @property
    def spec(self) -> str:
        """What a user types to get it: the name, and every setting in which it differs from the method of that name."""
        unnamed = self.name == Pruner.name
        told = _told(self, self.base or (Pruner() if unnamed else self))
        return ":".join([self.name, *(f"{path}={text_of(value)}" for path, value in told)])

    def params(self) -> dict[str, Any]:
        """Every part and its fields, by the paths that a user types: `{"remask": "drift", "remask.window": 8}`."""
        found: dict[str, Any] = {}
        for path, part in slots(self):
            found[path] = part.name
            for field in plain_fields(type(part)):
                found[f"{path}.{field.name}"] = getattr(part, field.name)
        return found


Known = Mapping[str, Mapping[str, type[Part]]]  # slot -> name -> part, of all there are


def changed(base: Pruner, given: Mapping[str, Any], known: Known) -> Pruner:
    """The composition `base` with other parts and values in it.

    Args:
        given: path -> value: for a slot the name of a part, a `Part`, or a mapping with its fields (and `part`, its
            name); for a field its value.

    Raises:
        UserError: a path, a part or a value that does not exist.
    """
    tree: dict[str, Any] = {}
    for path, value in given.items():
        steps = str(path).split(".")
        if steps[0] in OWNERS and steps[0] in known:
            steps = [OWNERS[steps[0]], *steps]
        if len(steps) > 1 and steps[-1] == "part":
            steps = steps[:-1]
        _merge(tree, steps, value, str(path))
    with naming(f"{base.name}: "):
        return dataclasses.replace(_filled(base, type(base), tree, known), base=base.base or base)


def _merge(tree: dict[str, Any], steps: list[str], value: Any, path: str) -> None:
    """Put a value into nested mappings. The part that fills a slot stands under `part`."""
    for step in steps:
        tree = tree.setdefault(step, {})
    if value is None:
        raise UserError(f"{path} has no value", "give one, or leave it out")
    if not isinstance(value, Mapping):
        value = {"part": value}
    for key, inner in value.items():
        if key != "part":
            _merge(tree, [str(key)], inner, f"{path}.{key}")
        elif "part" in tree:
            raise UserError(f"{path} is given twice", "leave one of them out")
        else:
            tree["part"] = inner


def flattened(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of nested mappings, in which `part` names the part that fills a slot."""
    for key, value in given.items():
        where = path if key == "part" and path else f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flattened(value, where)
        else:
            yield where, value


def _filled(current: Any, cls: type[Any], tree: Mapping[str, Any], known: Known, path: str = "") -> Any:
    """An object of the class with the values of `tree`; the others are those of `current`, or the defaults."""
    fields = _fields(cls)
    values = {n: getattr(current, n) for n in fields} if type(current) is cls else {}
    for name, inner in tree.items():
        if name == "part" and path:
            continue
        where = _below(path, name)
        slot = slot_of(cls, name) if name in fields else None
        if slot is not None:
            there: Any = values.get(name, fields[name].default)
            values[name] = _part(there, slot.slot, inner, known, where)
        elif name in fields and issubclass(cls, Part):
            if not inner:
                raise UserError(f"{where} has no value", "give one, or leave it out")
            if [*inner] != ["part"]:
                raise UserError(f"{where} is a plain field, and {next(iter(inner))!r} stands below it")
            values[name] = cast(where, kind_of(cls, name), inner["part"])
        else:
            raise _unknown(cls, name, path, where, known)
    return cls(**values)


def _part(current: Part, slot: str, tree: Mapping[str, Any], known: Known, path: str) -> Part:
    """The part that is to fill a slot: another part, or the one that is there with other values."""
    wanted, cls = tree.get("part"), type(current)
    if isinstance(wanted, Part):
        if wanted.slot != slot:
            raise UserError(f"{path} takes no {wanted.slot}", f"give one of {', '.join(known[slot])}")
        current, cls = wanted, type(wanted)
    elif wanted is not None:
        if str(wanted) not in known[slot]:
            raise UserError(f"there is no {path}={wanted}", nearest(str(wanted), known[slot]))
        cls = known[slot][str(wanted)]
    return _filled(current, cls, tree, known, path)


def _unknown(cls: type[Any], name: str, path: str, where: str, known: Known) -> UserError:
    """The error for a field that does not exist, with what may have been meant."""
    fields, slot = [*_fields(cls)], getattr(cls, "slot", None)
    if slot is None:
        return UserError(f"there is no {where!r}", nearest(name, known))
    owners = [f"{path}={other}" for other, part in known[slot].items() if name in _fields(part)]
    if owners or not fields:
        remedy = f"{' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "it has none"
        return UserError(f"{path}={cls.name} has no field {name!r}", remedy)
    return UserError(f"there is no {where!r}", nearest(where, [f"{path}.{field}" for field in fields]))


def _fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a user may set, those of the class itself in its order."""
    found = {f.name: f for f in dataclasses.fields(cls)}
    own = [name for name in inspect.get_annotations(cls) if name in found]
    return {name: found[name] for name in (*(n for n in found if n not in own), *own)}


def _below(path: str, name: str) -> str:
    """The path of a field of what stands at `path`."""
    return name if not path or OWNERS.get(name) == path else f"{path}.{name}"


def slot_names(cls: type[Any]) -> list[str]:
    """The fields that take parts."""
    return [name for name in _fields(cls) if slot_of(cls, name) is not None]


def text_of(value: Any) -> str:
    """A value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def slots(owner: Any, path: str = "") -> Iterator[tuple[str, Part]]:
    """Every part with its path, outer ones first."""
    for name in slot_names(type(owner)):
        part, where = getattr(owner, name), _below(path, name)
        yield where, part
        yield from slots(part, where)


def _told(owner: Any, usual: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings to be typed to turn the part `usual` into `owner`; None is a part with its defaults."""
    for name, field in _fields(type(owner)).items():
        value, where = getattr(owner, name), _below(path, name)
        before: Any = field.default if usual is None else getattr(usual, name)
        if slot_of(type(owner), name) is None:
            if isinstance(owner, Part) and value != before:
                yield where, value
            continue
        if type(value) is not type(before):
            yield where, value.name
            before = None
        yield from _told(value, before, where)


def plain_fields(cls: type[Part]) -> list[dataclasses.Field[Any]]:
    """The fields of a part that are no parts."""
    return [f for f in _fields(cls).values() if slot_of(cls, f.name) is None]
