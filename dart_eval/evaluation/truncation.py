"""Truncation of prompts that are longer than the model's context."""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dart_eval.evaluation.requests import Request
from dart_eval.util.errors import UserError


def fit(lm: HFLM, request: Instance, budget: int, field: str | None) -> tuple[str, bool]:
    """Cut the end of the document in a prompt, so that the prompt has at most `budget` tokens.

    Args:
        lm: for its tokenizer.
        field: of the document that may be cut; None leaves the prompt to lm-eval, which keeps its last tokens.

    Returns:
        The prompt, and whether it was or will be cut.

    Raises:
        UserError: the rest of the prompt alone is too long, or the document is not in the prompt.
    """
    prompt: str = request.args[0]
    excess = len(lm.tok_encode(prompt)) - budget
    if excess <= 0:
        return prompt, False
    document = str(request.doc.get(field, "")).strip() if field else ""
    at = prompt.rfind(document) if document else -1
    if at < 0:
        if field is None:
            return prompt, True
        raise UserError(f"the document of {request.task_name} was not found in its prompt")
    pieces = lm.tok_encode(document, add_special_tokens=False)
    keep = len(pieces) - excess
    while True:
        if keep <= 0:
            raise UserError(
                f"a prompt of {request.task_name} leaves no room for its document in {budget} tokens",
                "use fewer shots, a larger --max-length, or a model with a longer context",
            )
        short = lm.tok_decode(pieces[:keep]).rstrip()
        cut = prompt[:at] + short + prompt[at + len(document) :]
        excess = len(lm.tok_encode(cut)) - budget
        if excess <= 0:
            return cut, True
        keep -= excess


def truncated(context: list[int], continuation: list[int], max_length: int) -> Request:
    """Cut from the left as `HFLM` does: at most max_length + 1 tokens, the last of which is only predicted.

    Raises:
        UserError: the continuation alone is too long, or empty.
    """
    if not continuation:
        raise UserError("an answer has no token of its own after its context", "check the task's target_delimiter")
    if len(continuation) > max_length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit in {max_length}", "use a larger --max-length"
        )
    whole = (context + continuation)[-(max_length + 1) :]
    split = len(whole) - len(continuation)
    return Request(tuple(whole[:split]), tuple(whole[split:]))
