"""The kernels that save time: which methods have them, on which models, and why others have none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from dart_eval.kernels import gather
from dart_eval.kernels.chosen import ChosenRows
from dart_eval.kernels.mask_rows import MaskRows, unlike_plain
from dart_eval.layers.ffn import FFN, device_of
from dart_eval.layers.projection import is_conv1d
from dart_eval.pruning.choices import graded, previewed
from dart_eval.pruning.choices.dart_plus import DartPlus
from dart_eval.pruning.choices.preview import Previewing
from dart_eval.pruning.choices.serving import Serving
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.machine import release

Gatherer = Callable[[FFN], MaskRows]


def without_kernel(method: Pruner, gather: Gatherer | None) -> Part | None:
    """Return the part of a method that has no kernel, so that the method runs by masks; None if all parts have one.

    Args:
        gather: as `gatherer` returns it.
    """
    if method.compensation.fills:  # neurons that a token leaves out are still multiplied
        return method.compensation
    if method.other is not None:
        return method.other if gather is None else None
    return method.choice if method.choice.previews and gather is None else None


def gatherer(method: Pruner, ffns: Sequence[FFN]) -> Gatherer | None:
    """Return the class that reads only what a token chooses: for gated FFNs, on a CPU or by Triton's kernels; or None.

    With a preview, every token must choose the same number among all neurons.
    """
    choice = method.choice
    if method.other is not None:
        return None if unlike_plain(ffns) or _lacking(method.other, ffns) else MaskRows  # until `Execution.attach`
    if isinstance(choice, DartPlus):
        possible = not unlike_plain(ffns) and not ungraded(method, ffns)
        return functools.partial(graded.rows_of, choice=choice) if possible else None
    possible = (
        choice.gathers
        and not method.mask.remask.dense_tokens
        and all(f.gate is not None and not is_conv1d(f.down) for f in ffns)
        and all(device_of(f).type == "cpu" or gather.missing(device_of(f)) is None for f in ffns)
    )
    if not possible or not isinstance(choice, Previewing):
        return ChosenRows if possible else None
    if not method.mask.holds_all or not choice.exact or unlike_plain(ffns):
        return None
    if any(previewed.lacking(choice, f) for f in ffns):
        return None
    return functools.partial(previewed.PreviewedRows, choice=choice)


def ungraded(method: Pruner, ffns: Sequence[FFN]) -> str | None:
    """Return why dart-plus' kernel does not run a method of that choice, or None."""
    if not isinstance(method.choice, DartPlus) or not method.mask.holds_all:
        return "the kernel chooses among all neurons"
    return next(filter(None, (graded.lacking(method.choice, f) for f in ffns)), None)


def _lacking(part: Part, ffns: Sequence[FFN]) -> str | None:
    """Return why no kernel runs a part on all FFNs, or None."""
    return next(filter(None, map(part.lacking, ffns)), None)


def lacking(method: Pruner, ffns: Sequence[FFN]) -> str | None:
    """Return why one sequence decodes no faster under a pruning method; None if it can be faster."""
    if reason := unlike_plain(ffns):
        return reason
    gather = gatherer(method, ffns)
    if part := without_kernel(method, gather):
        return ungraded(method, ffns) if isinstance(part, DartPlus) else _lacking(part, ffns)
    if method.mask.holds_all and gather is None:
        return f"no kernel reads only the rows that {method.choice.title} chooses"
    return None


def hold_codes_alone(method: Pruner, ffns: Sequence[FFN], serving: Serving | None, serve: str) -> None:
    """Free the FFN weights of a model: the codes of its kernels are all that stays.

    Args:
        serving: the weights as codes; None: no kernel runs the method on this model.
        serve: as the user has it.

    Raises:
        UserError: only kernels for a CPU that run `dart-plus` read codes alone; or `serve` is something else.
    """
    if serve != "codes":
        raise UserError(f"unknown serve {serve!r}", nearest(serve, ("weights", "codes")))
    choice = method.choice
    if not serving or not isinstance(choice, DartPlus) or any(map(graded.by_triton, ffns)):
        reason = "serve='codes' is for dart-plus on a CPU, on a model that its kernel runs"
        raise UserError(reason, "use serve='weights'")
    serving.drop()
    for ffn in ffns:
        graded.hold_codes_alone(ffn, choice)
    release()
