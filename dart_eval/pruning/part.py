"""The base of all parts of a method: a name, fields with help, and checks.

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
from dart_eval.util.text import short_repr

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.ffn import FFN
    from dart_eval.layers.shape import ModelShape
    from dart_eval.util.bits import Stored

WORDS = {
    "true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False,
}  # fmt: skip
WANTED = {bool: "on or off", int: "a whole number", float: "a number", str: "text"}


def option(
    default: object, help: str, least: float | None = None, most: float | None = None, above: float | None = None
) -> Any:
    """Declare a field of a part.

    Args:
        help: one line for `dart-eval ls methods` and docs/methods.md.
        least: inclusive lower bound.
        most: inclusive upper bound.
        above: exclusive lower bound.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most, "above": above})


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts.

    Attributes:
        slot: the kind of part: `score`, `mask`, `draw`, `remask`, `choice`, `allocation`, `compensation` or `entries`.
        name: the word that a user types (`remask=drift`).
        summary: one line of help.
        observes: whether it sums over the tokens of a context (`observe`).
        needs_context: whether it needs tokens of a context. A sequence without a context then runs dense.
        calibrates: whether it needs a calibration text, in any slot.
        fits_experts: whether it supports routed experts, which differ from token to token.
        fits_norms: whether it supports FFNs with a norm over all neurons, behind which no neuron has a contribution
            of its own.
        fits_repeats: whether it counts a token once when a layer runs several times for it.
        upper_bound: whether it uses what is known only after the weights are read.
        flops_per_neuron: elementwise operations per neuron and observed token.
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
    upper_bound: ClassVar[bool] = False
    flops_per_neuron: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not slot_of(type(self), field.name):
                _check(self, field)
        check_slots(self, self.title)

    @property
    def title(self) -> str:
        """The part in messages: `remask=drift`."""
        return f"{self.slot}={self.name}"

    def check_bits(self, bits: Stored) -> None:
        """Refuse weights that it does not support. bits: bits of a served weight.

        Raises:
            UserError: with the reason.
        """

    def lacking(self, ffn: FFN) -> str | None:
        """Return why no kernel runs it on an FFN, or None."""
        return f"{self.title} has no kernel"

    def multiplied(self, read: float) -> float:
        """Return the share of the weights that a token multiplies. read: share of the bytes that it reads."""
        return read

    def contents(self) -> list[bytes]:
        """Return the contents of the files that it reads, which can change its numbers."""
        return []

    def observe(self, h: Tensor, weight: Tensor) -> Tensor | None:
        """Return the weighted sum over tokens that this part needs of one layer; None if it needs none.

        The weights keep chunks of a context and padding from changing the sum.

        Args:
            h: [B, T, F] fp32, the input of the down projection.
            weight: [B, T] fp32, usually 1, and 0 for padding.

        Returns:
            [B, F] fp32.
        """
        return None

    def flops_per_token(self, shape: ModelShape) -> float:
        """FLOPs per token of the context, beside those per neuron."""
        return 0

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        """FLOPs per decoded token. mask: neurons in the masks of all layers."""
        return 0


def slot_of(cls: object, name: str) -> type[Part] | None:
    """Return the first kind of part that a field takes; None for a plain value."""
    return next(iter(takes(cls, name)), None)


def takes(cls: object, name: str) -> tuple[type[Part], ...]:
    """Return the kinds of parts that a field takes; none for a plain value."""
    hint = _hints(cls).get(name)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return kinds if all(isinstance(kind, type) and issubclass(kind, Part) for kind in kinds) else ()


def check_slots(owner: object, title: str) -> None:
    """Refuse parts in slots that do not take them.

    Args:
        owner: a method or a part.
        title: its name in messages.

    Raises:
        UserError: lists the built-in parts that the slot takes.
    """
    cls: object = type(owner)
    for name in _hints(cls):
        allowed, value = takes(cls, name), getattr(owner, name, None)
        if not allowed or isinstance(value, allowed):
            continue
        names = sorted({cls.name for kind in allowed for cls in _named(kind)})
        if isinstance(value, Part):
            raise UserError(f"{value.title} does not go with {title}", f"give one of {', '.join(names)}")
        raise UserError(
            f"{name} is {short_repr(value)}, which is no part",
            f"give an object, such as {_named(allowed[0])[-1].__name__}(); names go into prune() or the method's text",
        )


def _named(kind: type[Part]) -> list[type[Part]]:
    """Return the built-in parts of a kind that have a name. Classes of other programs are not offered to users."""
    own = [kind] if "name" in vars(kind) and kind.__module__.startswith("dart_eval.") else []
    return own + [cls for below in kind.__subclasses__() for cls in _named(below)]


def kind_of(cls: object, name: str) -> object:
    """Return the type of a plain field: bool, int, float, str, or the tuple of its allowed words."""
    hint = _hints(cls)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else hint


@functools.cache
def _hints(cls: object) -> dict[str, object]:
    return typing.get_type_hints(cls)


def cast(title: str, kind: Any, value: Any) -> object:
    """Convert a value from typed text, YAML or Python to the type of a field.

    Raises:
        UserError: it cannot be converted; `title` names the field.
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


def _check(part: Part, field: dataclasses.Field[object]) -> None:
    """Refuse a value of the wrong type or outside its bounds."""
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
