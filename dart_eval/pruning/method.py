"""A pruning method is one class: its fields are its options, and a session calls its methods.

    check    does it fit these FFNs, at this sparsity?
    fit      before any prompt: codes, masks of all texts, thresholds
    begin    new sequences: tensors of its own in `rows`
    observe  context tokens pass, dense: what is added to `rows.sums`
    finish   a context forward is over: `rows.mask`, made anew
    decode   a decoded token: what down multiplies
    forwards what a projection computes in place of its product
    hooks    further hooks
    after    a decoding forward is over: new masks
    read     the share of the FFN weights that a token reads
    write    a text, where it is not written token by token

`fit` runs on a copy that the session owns. What belongs to sequences stands in `rows`, batch first.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from dart_eval.layers.ffn import FFN
from dart_eval.pruning.counts import NeuronCost
from dart_eval.util.bits import OWN_BITS, Stored
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.retired import retired
from dart_eval.util.text import short_repr
from dart_eval.weights.rounding import stored_of

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import dataclass_transform

    from dart_eval.layers.shape import ModelShape
    from dart_eval.pruning.calibration import Calibration
    from dart_eval.pruning.log import Log
    from dart_eval.pruning.rows import Rows
    from dart_eval.pruning.session import Session
    from dart_eval.util.text import Json

    Hook = tuple[nn.Module, str, Callable[..., Any]]  # module, the method that installs it, the hook
else:

    def dataclass_transform(**_: object) -> Any:
        return lambda cls: cls


# What a wrong value must be: by pydantic's word for a bound, else by the kind of the option.
BOUNDS = {
    "greater_than_equal": ("at least", "least"), "greater_than": ("above", "above"),
    "less_than_equal": ("at most", "most"),
}  # fmt: skip
NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
CHUNK_BYTES = 64 << 20  # of fp32 activations observed at a time


def option(
    default: object, help: str = "", least: float | None = None, most: float | None = None, above: float | None = None,
    when: str | None = None,
) -> Any:  # fmt: skip
    """Declare an option of a method: a field.

    Args:
        help: one line for `dart-eval ls methods` and docs/methods.md.
        least: inclusive lower bound.
        most: inclusive upper bound.
        above: exclusive lower bound.
        when: `remask.window` counts only while the option `remask` has this value.
    """
    bounds = {"least": least, "most": most, "above": above, "when": when}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class Option:
    """An option as a user types it.

    Attributes:
        path: `remask.window` is the field `remask_window`.
        kind: bool, int, float, str or a Literal.
        help, least, most, above, when: as of `option`.
    """

    path: str
    field: str
    kind: Any
    default: Any
    help: str
    least: float | None
    most: float | None
    above: float | None
    when: str | None

    @property
    def words(self) -> tuple[str, ...]:
        """The words that it takes; none if it takes a number or any text."""
        return typing.get_args(self.kind)

    def value_of(self, value: Any) -> Any:
        """Return a value from typed text, YAML or Python as one of its kind.

        Raises:
            UserError: it is none, or outside the bounds.
        """
        if self.words and isinstance(value, bool):  # YAML reads `on` and `off` as true and false
            value = "on" if value else "off"
        try:
            if isinstance(value, bool) and self.kind is not bool:
                raise ValueError
            return _checker(self.kind, self.least, self.most, self.above).validate_python(value)
        except ValueError as error:  # pydantic's is one
            if self.words:
                near = nearest(str(value), self.words)
                raise retired("value", str(value)) or UserError(f"{self.path} is {value!r}", near) from None
            word, bound = BOUNDS.get(error.errors()[0]["type"] if isinstance(error, ValidationError) else "", ("", ""))
            needed = f"{word} {getattr(self, bound):.10g}" if bound else NOUNS.get(self.kind, str(self.kind))
            raise UserError(f"{self.path} is {short_repr(value)}", f"it must be {needed}") from None


@functools.cache
def _checker(kind: Any, least: float | None, most: float | None, above: float | None) -> TypeAdapter[Any]:
    number = {"allow_inf_nan": False} if kind is float else {}
    return TypeAdapter(Annotated[kind, Field(ge=least, le=most, gt=above, **number)])


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class Method:
    """Base of all methods. A subclass is a dataclass: every field is an option.

    Attributes:
        name: the word that a user types and tables show.
        summary: one line for `dart-eval ls methods`.
        paper: arXiv number.
        recorded: what records say in place of `method: NAME`, so that old cells keep their rows; none in new methods.
        prunes: whether anything is ever left out.
        sized: whether the sparsity decides how much is left out.
        exact: whether the sparsity sets the bytes that every token reads; if not, they are measured.
        by_token: whether each token chooses what it reads, so that rounding errors decide near-ties.
        needs_context: whether a sequence without a context runs dense.
        keeps_state: whether sequences have state of their own.
        looks_ahead: whether masks are made from the very tokens that run under them.
        upper_bound: whether it uses what is known only after the weights are read.
        calibrates: whether it reads a calibration text.
        replaces: whether prompts, too, do not run on the model as it is.
        granularity: the unit that is left out, if not neurons.
        fits_experts: whether it supports routed experts, which differ from token to token.
        fits_norms: whether it supports a norm over all neurons before down.
        fits_repeats: whether it counts a token once when a layer runs several times for it.
        observe_flops: elementwise operations of `observe` per neuron and token; comparisons do not count.
    """

    name: ClassVar[str] = "custom"
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    recorded: ClassVar[Mapping[str, object]] = {}
    prunes: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    needs_context: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    upper_bound: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    granularity: ClassVar[str] = ""
    fits_experts: ClassVar[bool] = True
    fits_norms: ClassVar[bool] = True
    fits_repeats: ClassVar[bool] = True
    observe_flops: ClassVar[int] = 0

    ffns: Sequence[FFN]
    sparsity: float
    fixed_read: float = 1.0  # share of the served FFN weight bytes that a token reads as the sparsity says
    _counted: Tensor | None = None  # [B, T], by the current forward
    _inner: Method | None = None  # that prunes while this one writes

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(kw_only=True, unsafe_hash=True)(cls)

    def __post_init__(self) -> None:
        for one in self.options().values():
            setattr(self, one.field, one.value_of(getattr(self, one.field)))

    # -- options ---------------------------------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """Return the options by the paths that a user types. A new default in a subclass keeps help and bounds."""
        options = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            declared = ((base, vars(base).get("__dataclass_fields__", {}).get(field.name)) for base in cls.__mro__)
            base, first = next(((base, f) for base, f in declared if f is not None and f.metadata), (cls, option(None)))
            kind, path = typing.get_type_hints(base)[field.name], field.name.replace("_", ".", 1)
            options[path] = Option(path, field.name, kind, field.default, **first.metadata)
        return options

    def valid_options(self) -> dict[str, Option]:
        """Return the options that count: those of `remask=drift` only while it is that."""
        return {
            path: one for path, one in self.options().items()
            if one.when is None or getattr(self, path.partition(".")[0]) == one.when
        }  # fmt: skip

    @property
    def spec(self) -> str:
        """The spelling that a user types: the name, and every option that differs from its default."""
        values = {path: getattr(self, one.field) for path, one in self.valid_options().items()}
        changed = [f"{path}={text_of(v)}" for path, v in values.items() if v != self.options()[path].default]
        return ":".join([self.name, *changed])

    def params(self) -> dict[str, object]:
        """Return what a record says of the method: every option by its path, and the words in `recorded`."""
        made_of = self.recorded or {"method": self.name}
        return {**made_of, **{path: getattr(self, one.field) for path, one in self.valid_options().items()}}

    def contents(self) -> list[bytes]:
        """Return the contents of the files that its options name, which can change its numbers."""
        return []

    # -- before any prompt -----------------------------------------------------------------------------------------

    def check(self, ffns: Sequence[FFN], sparsity: float, bits: Stored | None = None) -> None:
        """Refuse FFNs that the method does not fit, or a sparsity that it cannot meet on them.

        Args:
            bits: bits of a served weight, if they are to be rounded first; None: as they are.

        Raises:
            UserError: with the reason.
        """
        if any(f.routed for f in ffns) and not self.fits_experts:
            raise UserError(f"{self.name} is not made for experts yet", "take another method, or a dense model")
        if any(f.norm is not None for f in ffns) and not self.fits_norms:
            raise self.unfit("an FFN that has a norm of its neurons before down")
        if any(f.runs > 1 for f in ffns) and not self.fits_repeats:
            raise self.unfit("layers that run several times for a token")

    def unfit(self, what: str) -> UserError:
        """Return the refusal of a kind of FFN."""
        return UserError(f"{self.name} does not fit {what}", "take another method, such as griffin")

    @staticmethod
    def refuse_codes(ffns: Sequence[FFN], bits: Stored | None, reason: str) -> None:
        """Refuse served weights that are codes already, with the reason why the method needs 16 bits."""
        for stored in [bits] if bits else [stored_of(m) for f in ffns for m in f.projections]:
            if stored.code != OWN_BITS:
                raise UserError(
                    f"{reason}, and these have {stored.total:.3g} bits",
                    "leave --ffn-bits out, or load the model unquantised",
                )

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that no model allows, before one is loaded."""

    @property
    def fits_all(self) -> bool:
        """Whether it fits all FFNs that run once for a token, at any sparsity."""
        return self.fits_experts and self.fits_norms

    def fit(self, ffns: Sequence[FFN], sparsity: float, calibration: Calibration | None) -> None:
        """Prepare the method for a model, before any prompt.

        Args:
            ffns: of the model.
            sparsity: share of the FFN weight bytes that a decoded token does not read.
            calibration: of methods that read a text, or the weights of all layers.
        """
        self.ffns, self.sparsity, self.fixed_read = ffns, sparsity, 1.0

    # -- texts written otherwise than token by token ---------------------------------------------------------------

    @property
    def inner(self) -> Method:
        """The method that prunes while this one writes texts; itself if `generate` writes them as always."""
        return self._inner or self

    def write(self, session: Session, model: Any, input_ids: Tensor, **of_generate: Any) -> object:
        """Return a prompt with its text, as a decoding loop of transformers does (`generate(custom_generate=...)`).

        Args:
            session: of the inner method.
            input_ids: [1, T], the prompt.
            of_generate: `logits_processor`, `stopping_criteria`, `generation_config` and more.
        """
        raise NotImplementedError

    # -- sequences -------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """Give new sequences tensors of the method's own."""

    def observe(self, ffn: FFN, h: Tensor, weight: Tensor) -> Tensor:
        """Return the sum over context tokens that `rows.sums` gathers. Called for some tokens at a time.

        Args:
            h: [B, T, pool] fp32, the input of the down projection: F neurons, but with experts those of all, 0 where a
                token lacks an expert. A token's own are `ffn.size`.
            weight: [B, T] fp32, 1 for real tokens; 0 for padding, where h is 0, too.

        Returns:
            [B, pool] fp32.
        """
        raise NotImplementedError

    @torch.no_grad()
    def add(self, sums: Tensor | None, ffn: FFN, h: Tensor, weight: Tensor) -> Tensor:
        """Return sums with what `observe` gives for these tokens, a few tokens at a time.

        Args:
            sums: [B, pool] fp32; None: of no tokens yet.
            h: [B, T, F], the input of the down projection.
            weight: [B, T], 1; 0 for padding.
        """
        weight, length = weight.to(h.device, torch.float32), h.shape[1]
        padding = weight == 0
        if bool(padding.any()):  # padding may hold NaN
            h = h.masked_fill(padding[..., None], 0)
        step = max(1, CHUNK_BYTES // (4 * h.shape[0] * ffn.pool))
        for start in range(0, length, step):
            part = slice(start, start + step)
            new = self.observe(ffn, ffn.spread(h[:, part].float(), part, length), weight[:, part])
            sums = new if sums is None else sums + new
        assert sums is not None  # a forward has tokens
        return sums

    def forget(self, rows: Rows) -> None:
        """Forget what sequences were observed to do so far."""
        rows.sums, rows.seen = [None] * len(self.ffns), torch.zeros_like(rows.seen)

    def finish(self, rows: Rows, valid: Tensor) -> None:
        """Close a context forward. valid: [B, T] bool, False for padding."""

    def decode(self, ffn: FFN, h: Tensor, rows: Rows) -> Tensor:
        """Return what down multiplies in place of h, of decoded tokens: [B, T, F]."""
        raise NotImplementedError

    def forwards(self, session: Session) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Return what projections compute in place of their products, while the session lasts."""
        return {}

    def hooks(self, session: Session) -> list[Hook]:
        """Return further hooks: module, the name of the method that installs one, the hook."""
        return []

    def after(self, rows: Rows, valid: Tensor, log: Log) -> bool:
        """Close a decoding forward: make new masks, and log them.

        Args:
            valid: [B, T] bool, False for padding and after a sequence's end.

        Returns:
            Whether masks or what tokens read may have changed.
        """
        return False

    @property
    def releases(self) -> bool:
        """Whether tokens run dense after a number of them."""
        return False

    def room(self, rows: Rows) -> int | None:
        """Return the tokens that may run in one forward before a mask may change; None for any number."""
        return None

    def masks(self, rows: Rows) -> list[Tensor]:
        """Return the masks in force, per layer [B or 1, pool] bool; none while tokens run dense, or without masks."""
        return []

    def trace(self, rows: Rows, log: Log, row: int, tokens: int | None) -> Json | None:
        """Return a detector's trace of one sequence: see `Session.trace`. None without a detector."""
        return None

    def dense_now(self, rows: Rows) -> Tensor | None:
        """Return [B] bool, the sequences that have masks and yet run dense now; None: none."""
        return None

    # -- costs -----------------------------------------------------------------------------------------------------

    def read(self, rows: Rows, valid: Tensor | None = None) -> Tensor:
        """Return the share of the served FFN weight bytes that a token reads: [B] fp64 on the CPU.

        Args:
            valid: [B, T] bool, the tokens of the forward that is over, whose mean counts, and counting begins anew;
                None: as the sparsity says.
        """
        if valid is None or self._counted is None:
            return self.expected_read(rows)
        read, self._counted = self._counted, None
        real = valid.cpu().double()
        return (read * real).sum(1) / real.sum(1).clamp_min(1)

    def expected_read(self, rows: Rows) -> Tensor:
        """Return the share as the sparsity says, of what is not counted: [B] fp64."""
        return torch.full((len(rows),), self.fixed_read, dtype=torch.float64)

    def count(self, read: Tensor) -> None:
        """Count what the tokens of the current forward read, where it is measured. read: [B, T] fp64, a share."""
        self._counted = read if self._counted is None else self._counted + read

    def clear(self) -> None:
        """Forget what was counted of a forward that an exception ended. Not called if `exact`."""
        self._counted = None

    def in_mask(self, rows: Rows) -> Tensor:
        """Return the share of the neurons in the masks: [B] fp64 on the CPU."""
        return torch.ones(len(rows.seen), dtype=torch.float64)

    def computed(self, read: float) -> float:
        """Return the share of the FFN weights that a pruned token multiplies. read: the share that it reads."""
        return read

    def fetched(self, read: float) -> float | None:
        """Return the share of the served bytes that a token fetches in lines of 64 bytes; None: unknown.

        Matrices lie as suits the method best: here whole, or by neurons (`NeuronCost.fetched`). read: a mean.
        """
        if not self.sized or self.granularity:
            return None if self.sized else read
        cost = NeuronCost(self.ffns, self.sparsity)
        return cost.fetched(cost.counts, read)

    def nbytes(self) -> int:
        """Return the bytes of masks and statistics that all sequences share."""
        return 0

    def weight_bytes(self, fast: bool) -> int:
        """Return the bytes of copies, codes and decoded values of weights that lie beside the model.

        Args:
            fast: whether one sequence decodes by copies or a kernel, which then count although this session may not.
        """
        return 0

    def prompt_flops(self, shape: ModelShape) -> float:
        """FLOPs per token of the context, beside those of `observe`."""
        return 0

    def step_flops(self, shape: ModelShape) -> float:
        """FLOPs per decoded token."""
        return 0

    def remask_cost(self, shape: ModelShape, observing: int, weights_read: float) -> tuple[int, float]:
        """Return the FLOPs of a re-mask, and what it reads / the FFN weights of a dense token. See `cost.Overhead`."""
        return 0, 0.0

    # -- kernels ---------------------------------------------------------------------------------------------------

    def why_no_kernel(self, ffns: Sequence[FFN]) -> str | None:
        """Return why one sequence decodes no faster on plain weights, or None."""
        return f"{self.name} has no kernel"

    def kernel(self, ffn: FFN) -> Any:
        """Return what runs an FFN for one token, [1, D] -> [1, D]; None: products with copies of the mask's rows."""
        return None


class Measured(Method):
    """Base of methods whose tokens choose columns, or bits of them: what they read is measured."""

    exact = False
    by_token = True
    fits_experts = False
    fits_norms = False
    fits_repeats = False


def text_of(value: object) -> str:
    """Spell a value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
