"""How a task is asked."""

from __future__ import annotations

from dataclasses import dataclass


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
