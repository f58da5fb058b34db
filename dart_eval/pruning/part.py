"""What all parts of a method have in common: a name, fields with help, and checks.

A part is a frozen dataclass. A field is declared by `option`, with its help and its bounds; a field that is itself a
part (a mask's score, say) is a slot that a user may fill with another part of its kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dart_eval.util.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape

WORDS = {
    "true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False,
}  # fmt: skip
WANTED = {bool: "on or off", int: "a whole number", float: "a number", str: "text"}


def option(
    default: Any, help: str, least: float | None = None, most: float | None = None, above: float | None = None
) -> Any:
    """A field of a part.

    Args:
        default: its value where none is given.
        help: one line for `dart-eval ls methods` and docs/methods.md.
        least, most: bounds that it may reach. above: a lower bound that it may not reach.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most, "above": above})


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts.

    Attributes:
        slot: the kind of part: `score`, `mask`, `draw`, `remask`, `choice`, `image`, `allocation`, `compensation`,
            `entries` or `routing`.
        name: what a user types to choose it (`remask=drift`).
        summary: one line that says what it does.
        observes: whether it keeps a sum over the tokens of a context (`observe`).
        needs_context: whether it can do nothing before tokens of a context have been seen. A sequence without a
            context then runs dense.
        calibrates: whether it asks for a calibration text, wherever it stands.
        fits_experts: whether it is made for routed experts, too, of which each token has others.
        fits_norms: whether it does without a neuron's own part of what an FFN adds, which is not there behind a norm of
            all neurons.
        fits_repeats: whether it counts a token once where a layer runs several times for it.
    """

    slot: ClassVar[str]
    name: ClassVar[str]
    summary: ClassVar[str]
    observes: ClassVar[bool] = False
    needs_context: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    fits_experts: ClassVar[bool] = True
    fits_norms: ClassVar[bool] = True
    fits_repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not slot_of(type(self), field.name):
                _check(self, field)
        check_slots(self, self.title)

    @property
    def title(self) -> str:
        """What messages call it: `remask=drift`."""
        return f"{self.slot}={self.name}"

    def files(self) -> list[str]:
        """The files that it reads, whose contents can change its numbers."""
        return []

    # What it keeps of every token that a mask is made from, and what it computes beside the model. -----------------

    def observe(self, h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor | None:
        """The sum over tokens that this part wants to be kept, layer by layer; None where it wants none.

        The sum must be weighted, so that chunks of a context and padding cannot change it.

        Args:
            h: [B, T, F] fp32, the input of the down projection.
            up: [B, T, F] fp32, up x, where the part declares `needs_up`; None for a plain FFN.
            weight: [B, T] fp32, what a token counts: usually 1, and 0 for padding.

        Returns:
            [B, F] fp32.
        """
        return None

    def flops_per_neuron(self) -> int:
        """Elementwise operations for each neuron of every token that is observed."""
        return 0

    def flops_per_token(self, shape: ModelShape) -> float:
        """FLOPs for each token of the context, beside those for each neuron."""
        return 0

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        """FLOPs for each decoded token.

        Args:
            shape: sizes of the model.
            mask: neurons in the masks of all layers.
        """
        return 0


def slot_of(cls: Any, name: str) -> type[Part] | None:
    """The kind of part that a field takes, the first of several, or None where it takes a plain value."""
    return next(iter(takes(cls, name)), None)


def takes(cls: Any, name: str) -> tuple[type[Part], ...]:
    """The kinds of parts that a field takes; none where it takes a plain value."""
    hint = _hints(cls).get(name)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return kinds if all(isinstance(kind, type) and issubclass(kind, Part) for kind in kinds) else ()


def check_slots(owner: Any, title: str) -> None:
    """Refuse parts in slots that take others.

    Args:
        owner: a method or a part. title: what messages call it.

    Raises:
        UserError: with the names of our own that it takes.
    """
    cls: Any = type(owner)
    for name in _hints(cls):
        allowed, value = takes(cls, name), getattr(owner, name, None)
        if allowed and isinstance(value, Part) and not isinstance(value, allowed):
            names = sorted({cls.name for kind in allowed for cls in _named(kind)})
            raise UserError(f"{value.title} does not go with {title}", f"give one of {', '.join(names)}")


def _named(kind: type[Part]) -> list[type[Part]]:
    """Our own parts of a kind that have a name: not each class that a program defines is one that it offers."""
    own = [kind] if "name" in vars(kind) and kind.__module__.startswith("dart_eval.") else []
    return own + [cls for below in kind.__subclasses__() for cls in _named(below)]


def kind_of(cls: Any, name: str) -> Any:
    """What a plain field takes: bool, int, float, str, or the tuple of words that it may be."""
    hint = _hints(cls)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else hint


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def cast(title: str, kind: Any, value: Any) -> Any:
    """A value in the kind that a field takes, from text as typed, YAML or Python.

    Raises:
        UserError: it is none; `title` names the field.
    """
    if isinstance(kind, tuple):
        # YAML reads `on` and `off` as true and false.
        text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else str(value)
        if text not in kind:
            raise UserError(f"{title} is {value!r}", nearest(str(text), kind))
        return text
    try:
        if kind is bool:
            return value if isinstance(value, bool) else WORDS[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise UserError(f"{title} is {value!r}", f"it must be {WANTED.get(kind, kind.__name__)}") from None


def _check(part: Part, field: dataclasses.Field[Any]) -> None:
    """Refuse a value of the wrong kind or outside its bounds."""
    kind, value, bounds = kind_of(type(part), field.name), getattr(part, field.name), field.metadata
    title = f"{part.slot}.{field.name}"
    object.__setattr__(part, field.name, value := cast(title, kind, value))
    low, high, above = bounds.get("least"), bounds.get("most"), bounds.get("above")
    if (low is not None and value < low) or (above is not None and value <= above):
        raise UserError(
            f"{title} is {value:g}", f"it must be {f'at least {low:g}' if above is None else f'more than {above:g}'}"
        )
    if high is not None and value > high:
        raise UserError(f"{title} is {value:g}", f"it must be at most {high:g}")
