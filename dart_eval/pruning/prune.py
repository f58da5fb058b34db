"""`prune()` attaches a method to a model, lets the block run, and detaches the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from dart_eval.layers.guard import refuse_second
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.choices.choice import Choice
from dart_eval.pruning.inputs.entries import Entries
from dart_eval.pruning.masks.allocations import Allocation
from dart_eval.pruning.masks.compensations import Compensation
from dart_eval.pruning.masks.counts import check_sparsity
from dart_eval.pruning.masks.mask import Mask
from dart_eval.pruning.masks.remasks import Remask
from dart_eval.pruning.masks.scores import AnyScore
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session.execution import Wanted
from dart_eval.pruning.session.session import Session
from dart_eval.util.errors import UserError

PartSpec = str | Mapping[str, object]  # the name of a part, or its fields with the name under `part`


def _method_with(method: str | Pruner, **slots: Part | PartSpec | None) -> Pruner:
    """Return the method with other parts in its slots.

    Args:
        method: a spelling as typed, or a `Pruner`.
        slots: the new part of each slot; None leaves the slot as it is.

    Raises:
        UserError: a name is unknown, a value is wrong, or a slot is given twice.
    """
    parts = {slot: part for slot, part in slots.items() if part is not None}
    if isinstance(method, Pruner):
        if parts:
            raise UserError("parts go into the Pruner itself, not beside it", "use dataclasses.replace")
        return method
    if not isinstance(method, str):
        raise UserError(f"method {method!r} is neither a name nor a Pruner", "for example 'dart'")
    name, typed = parse(method)
    if twice := sorted(typed.keys() & parts.keys()):
        raise UserError(f"{name}: {twice[0]} is given twice", "leave one of them out")
    return make(name, {**typed, **parts})


@contextmanager
def prune(
    model: nn.Module,
    method: str | Pruner = "dart",
    sparsity: float = 0.5,
    *,
    tokenizer: object = None,
    calibration: Calibration | str | Path | None = None,
    execution: Wanted = "auto",
    shared_mask: bool = False,
    mask: Mask | PartSpec | None = None,
    score: AnyScore | PartSpec | None = None,
    remask: Remask | PartSpec | None = None,
    choice: Choice | PartSpec | None = None,
    allocation: Allocation | PartSpec | None = None,
    compensation: Compensation | PartSpec | None = None,
    entries: Entries | PartSpec | None = None,
) -> Iterator[Session]:
    """Prune the FFN neurons of `model` while the block runs. Afterwards the model is as it was, bit for bit.

    The prompt (prefill) runs dense, and every decoded token pruned:

        with prune(model, "dart", sparsity=0.7) as session:
            model.generate(**inputs)

    Args:
        model: a Hugging Face causal language model with a gated or plain FFN.
        method: a spelling as on the command line (`dart`, `dart:remask.window=8`), or a `Pruner`.
        sparsity: share of the FFN weights that a decoded token does not read, in [0, 1).
        tokenizer, calibration: of methods that read a text (`wanda-sp`): another file, or a ready `Calibration`.
        execution: `masked` saves no time; `copied` multiplies copies of one mask's weights; `auto`: as they allow.
        shared_mask: all sequences of a batch have one mask.
        mask, score, remask, choice, allocation, compensation, entries: another part in that slot, as an object
            (`OnDrift(window=8)`), a name (`"drift"`), or fields (`{"part": "drift", "window": 8}`).

    Yields:
        The `Session`, with effective sparsity, state bytes and re-masks.

    Raises:
        UserError: an unknown name, a sparsity outside [0, 1), or an FFN or weights that the method does not support.
    """
    check_sparsity(sparsity)
    refuse_second(model)
    method = _method_with(
        method, mask=mask, score=score, remask=remask, choice=choice, allocation=allocation,
        compensation=compensation, entries=entries,
    )  # fmt: skip
    if calibration is None or isinstance(calibration, str | Path):
        calibration = Calibration(model, tokenizer, calibration)
    session = Session(model, method, sparsity, calibration, execution, shared_mask)
    try:
        session.attach()
        yield session
    finally:
        session.detach()
