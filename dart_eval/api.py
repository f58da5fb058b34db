"""`dart_eval.evaluate`, the Python form of `dart-eval run`. It imports torch only when it is called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING

from dart_eval.sweep.events import silent
from dart_eval.sweep.options import DEFAULTS, HINTS
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dart_eval.sweep.options import RunConfig


def evaluate(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    tasks: str | Sequence[str],
    name: str | None = None,
    progress: bool | None = None,
    **options: object,
) -> list[Json]:
    """Run methods at sparsities on tasks, as `dart-eval run` does; finished cells are read, not run again.

        dart_eval.evaluate(tasks="smoke_questions", method=["dense", "dart"], sparsity=0.5, limit=20)

    Args:
        model: a name or folder, or a loaded model; None is the demo model.
        tokenizer: of a loaded model; else the name or folder of another one than the model's.
        tasks: names, as a list or as text with commas; so are `method` and `sparsity`.
        name: of a loaded model, by which its finished cells are found again.
        progress: show how far it is, on stderr; None: where that is a terminal or a notebook.
        options: those of `dart-eval run`, by the same names (docs/options.md).

    Returns:
        One row for each metric of each cell, as of `dart-eval tables --format json`.

    Raises:
        UserError: the input is wrong.
        RuntimeError: cells failed, or files of finished ones were deleted meanwhile; all others are in `output`.
    """
    from dart_eval.results.frame import lines
    from dart_eval.results.store import Store
    from dart_eval.sweep.options import configs_from

    given = {key: value for key, value in {"tasks": tasks, **options}.items() if value is not None}
    if model is None or isinstance(model, (str, Path, bytes)):
        if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
            raise UserError("a loaded tokenizer goes with a loaded model", "leave it out, or give its name")
        if name is not None:
            raise UserError("name is for a loaded model", "leave it out: this one has a name")
        configs = configs_from(None, {**given, "model": model, "tokenizer": tokenizer})
        ready = None
    else:
        from dart_eval.layers.verify import evaluating
        from dart_eval.models.loaded import Loaded

        configs = configs_from(None, given)
        _refuse_settings_of_loading(configs[0])
        ready = Loaded.named(name, model, tokenizer)
    from dart_eval.cli.view import TerminalView
    from dart_eval.cluster import run

    view = TerminalView()
    shown = view.live or view.console.is_jupyter if progress is None else progress
    model_in_use = contextlib.nullcontext() if ready is None else evaluating(ready.model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # no remarks on options of its own
    with view if shown else contextlib.nullcontext(silent) as tell, model_in_use:
        result = run.run_all(configs, tell, model=ready)
    if result.failed:
        raise RuntimeError(f"cells failed: {', '.join(cell.name for cell in result.failed)}")
    return lines(Store(configs[0].output), result.records).to_dict("records")


# What a notebook shows of it: the options by name, from the list.
*_OWN, _ = signature(evaluate).parameters.values()
_OWN += [
    Parameter(name, Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=HINTS[name])
    for name in DEFAULTS if name not in ("model", "tokenizer", "tasks")
]  # fmt: skip
evaluate.__signature__ = signature(evaluate).replace(parameters=_OWN)  # type: ignore[attr-defined]


def _refuse_settings_of_loading(config: RunConfig) -> None:
    """Refuse options that no longer apply to a loaded model.

    Raises:
        UserError: such an option is given.
    """
    from dart_eval.models.spec import ModelSpec

    for name in (*[field.name for field in fields(ModelSpec)[1:]], "workers", "ray"):
        if getattr(config, name) != getattr(type(config)(), name):
            raise UserError(f"{name} is for a model that is to be loaded", "leave it out, or give the model's name")
