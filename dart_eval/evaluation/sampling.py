"""Settings of generation, and which of them draw tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from dart_eval.util.errors import UserError
from dart_eval.util.text import LENGTHS


def draws(kwargs: Mapping[str, object]) -> bool:
    """Whether these settings of generation draw tokens."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    return bool(normalize_gen_kwargs(given).get("do_sample"))


def overridden(own: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Return a task's settings of generation with the user's before them, whatever name a length goes by.

    Raises:
        UserError: a temperature without effect, as the task draws no tokens; or draws at the task's temperature of 0.
    """
    settings = {name: value for name, value in own.items() if not (name in LENGTHS and given.keys() & {*LENGTHS})}
    settings.update(given)
    if given.get("temperature") and settings.get("do_sample") is False:
        raise UserError(
            f"gen_kwargs temperature={given['temperature']} has no effect with do_sample=false",
            "give do_sample=true, or leave it out",
        )
    if given.get("do_sample") and "temperature" not in given and settings.get("temperature") == 0:
        raise UserError(
            "gen_kwargs do_sample=true draws tokens, and the task's own temperature 0 draws none", "add temperature=1"
        )
    return settings


def task_draws(members: Sequence[Task]) -> bool:
    """Whether one of these tasks draws its answers."""
    return any(t.OUTPUT_TYPE == "generate_until" and draws(t.get_config("generation_kwargs") or {}) for t in members)
