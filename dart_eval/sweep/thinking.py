"""Options for models that think before they answer. Nothing here imports torch."""

from __future__ import annotations

from dart_eval.util.errors import UserError


def check_thinking(thinks: bool | None, end_token: str | int | None, chat_template: bool) -> None:
    """Refuse what lm-eval refuses, and options without effect.

    Args:
        thinks: `--enable-thinking`. end_token: `--think-end-token`. chat_template: `--chat-template`.
    """
    if thinks is not None and not chat_template:
        raise UserError(f"--{'' if thinks else 'no-'}enable-thinking needs --chat-template", "add --chat-template")
    if thinks and end_token is None:
        raise UserError(
            "--enable-thinking needs the token that ends thinking", "add --think-end-token, such as </think>"
        )


def check_kind(task: str, output_type: str, enable_thinking: bool | None) -> None:
    """Refuse thinking on a task that scores given answers.

    Args:
        task: its name.
        output_type: as lm-eval has it.
    """
    if enable_thinking and output_type in ("loglikelihood", "multiple_choice"):
        raise UserError(
            f"task {task} scores given answers, which a thinking model does not write at once",
            "leave --enable-thinking or the task out",
        )
