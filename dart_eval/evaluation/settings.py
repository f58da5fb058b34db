"""How a task is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import LENGTHS, short_repr

if TYPE_CHECKING:
    from dart_eval.pruning.method import Method


@dataclass(frozen=True)
class EvalSettings:
    """Settings of a task: few-shot examples, number of items (below 1 a share), seed, chat template, scope.

    Attributes:
        system_instruction: text before the prompt.
        fewshot_as_multiturn: whether examples are turns of the chat template; None is lm-eval's default.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    seed: int = 0
    chat_template: bool = False
    scope: str = "scored"
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None


PLAIN = (bool, int, float, str, list)
KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # of settings of generation
    "do_sample": ((bool,), "true or false"), "temperature": ((int, float), "a number"),
    "until": ((str, list), "a text or a list of texts"), **dict.fromkeys(LENGTHS, ((int,), "a whole number")),
}  # fmt: skip


def check_generation(settings: Mapping[str, object]) -> None:
    """Refuse what is no setting of generation: unknown names, code, models and objects.

    What is taken are lm-eval's words and the fields of transformers' `GenerationConfig`, as numbers, texts and lists of
    them. `generate` takes more, and some of it is code: `custom_generate` names a repository that is run.

    Raises:
        UserError: the name, and one that is near.
    """
    known = {*KINDS}
    for name, value in settings.items():
        kinds, words = KINDS.get(name, (PLAIN, "a number, a text, or a list of them"))
        items = value if isinstance(value, list) else []
        if not (value is None or isinstance(value, kinds)) or not all(isinstance(item, PLAIN) for item in items):
            raise UserError(f"the setting of generation {name}={short_repr(value)} must be {words}")
    if settings.keys() - known:
        from transformers import GenerationConfig  # takes seconds

        known |= {name for name in GenerationConfig().to_dict() if not re.search("^_|_config$|^constraints$", name)}
    for name in (name for name in settings if name not in known):
        remedy = "use until" if name == "stop" else nearest(name, known)
        raise UserError(f"{short_repr(name)} is no setting of generation", remedy)


def check_released(method: Method, scope: str) -> None:
    """Refuse a method whose masks are released after some tokens, where inputs run pruned at once.

    Raises:
        UserError: the remedy.
    """
    if scope == "all" and method.releases:
        raise UserError(
            f"{method.spec} counts decoded tokens, and under --scope all whole inputs run pruned",
            "use --scope scored, or leave remask.release out",
        )
