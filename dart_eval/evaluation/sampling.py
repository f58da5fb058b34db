"""Tasks that draw their answers: one stream of random numbers per batch, whatever ran before it.

So draws do not depend on interruptions or on where batches run. They do depend on which prompts share a batch, so the
batch size is part of such a cell's key. (If memory runs out and batches are halved, `halved` in the record says so.)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
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


def begin_stream(seed: int, names: Sequence[str]) -> None:
    """Seed the random numbers of a batch. names: of its requests, in order."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def request_names(requests: Sequence[tuple[object, ...]], drawn: Sequence[bool], name: Callable[..., str]) -> list[str]:
    """Return a name for each request. Equal requests share a name, unless they draw.

    name: makes a name from a request's parts.
    """
    seen: Counter[str] = Counter()
    names = []
    for request, draw in zip(requests, drawn, strict=True):
        names.append(name(*request))
        if draw:
            seen[names[-1]] += 1
            names[-1] = name(*request, seen[names[-1]])
    return names
