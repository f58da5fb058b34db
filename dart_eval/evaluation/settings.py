"""How a task is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.util.errors import UserError

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
