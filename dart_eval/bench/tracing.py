"""One prompt under a method, step by step: the detector's values, and the times and sizes of mask changes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dart_eval.bench.decode import check_length
from dart_eval.evaluation.tasks import Tasks
from dart_eval.layers.families import cache_argument
from dart_eval.layers.finite import refuse_not_finite
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.griffin import PromptMask
from dart_eval.pruning.session import prune
from dart_eval.results.metrics import asked
from dart_eval.util.errors import UserError


def smoke_passage() -> tuple[str, str | None]:
    """Return both halves of the first shipped two-topic document (task `drift_smoke`)."""
    (task,) = Tasks().load("drift_smoke")
    document = next(iter(task.eval_docs))
    return document["context"], document["rest"]


@torch.no_grad()
def trace(
    model: PreTrainedModel, tokenizer: Any, method: Method, sparsity: float, prompt: str, then: str | None, tokens: int
) -> dict[str, Any]:
    """Run a prompt dense, then at most `tokens` tokens pruned: those of `then`, or the model's own.

    Returns:
        Plain data: the tokens and the natural log of each one's probability; neurons kept in each layer; what the
        detector saw, or None; re-masks with the overlap of the old and the new mask per layer; the costs.

    Raises:
        UserError: a text is too short or too long, the method makes no mask from a prompt, or a number is not finite.
    """
    if not isinstance(method, PromptMask) or method.looks_ahead:
        raise UserError(f"method {method.name} makes no mask from a prompt", "trace one that does: griffin, dart")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    text = None if then is None else tokenizer(then, add_special_tokens=False)["input_ids"][:tokens]
    if ids.shape[1] < 2 or text == []:
        raise UserError("the prompt has fewer than two tokens, or its text none", "give a longer text")
    check_length(model, ids.shape[1] + len(text or range(tokens)), "prompt and text", "give shorter ones")
    with prune(model, method, sparsity, calibration=Calibration(model, tokenizer), execution="masked") as session:
        decoded, logprobs = _decode(model, ids, text, len(text or range(tokens)))
        assert session.rows is not None
        return {
            "method": method.name, "params": method.params(), "sparsity": sparsity, "prompt_tokens": ids.shape[1],
            "tokens": [tokenizer.decode([t]) for t in decoded], "logprobs": logprobs,
            "layers": {"kept": session.rows.counts[0, :, 0].tolist(), "sizes": [f.size for f in session.ffns]},
            "detector": session.trace(0),
            "remasks": [{k: e[k] for k in ("token", "overlap")} for e in session.events],
            **{k: getattr(session, k) for k in ("effective_sparsity", "weights_read", "memory", "state_bytes")},
        }  # fmt: skip


def _decode(model: Any, prompt: torch.Tensor, text: list[int] | None, count: int) -> tuple[list[int], list[float]]:
    """Read a prompt, then `count` tokens one by one: those of a text, or the model's own until it ends."""
    ends, decoded, logprobs = getattr(model.generation_config, "eos_token_id", None), list[int](), list[float]()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    while True:
        scores = out.logits[0, -1].float().log_softmax(-1)
        decoded.append(int(scores.argmax()) if text is None else text[len(decoded)])
        refuse_not_finite(scores[decoded[-1]], "log-probabilities of a token", model.dtype)
        logprobs.append(float(scores[decoded[-1]]))
        if len(decoded) == count or (text is None and decoded[-1] in (ends if isinstance(ends, list) else [ends])):
            return decoded, logprobs
        cache = {cache_argument(model): getattr(out, "cache", None) or out.past_key_values}
        out = model(torch.tensor([decoded[-1:]], device=prompt.device), use_cache=True, **cache)


def summary(trace: dict[str, Any]) -> str:
    """Return a trace in a few lines for a terminal."""
    shares = [k / n for k, n in zip(trace["layers"]["kept"], trace["layers"]["sizes"], strict=True)]
    mean, alarms = sum(trace["logprobs"]) / len(trace["logprobs"]), (trace["detector"] or {}).get("alarms")
    overlaps = [sum(r["overlap"]) / len(r["overlap"]) for r in trace["remasks"]]
    return (
        f"{trace['method']} at {asked(trace['sparsity'])}: a prompt of {trace['prompt_tokens']} tokens, then "
        f"{len(trace['tokens'])}; mean log-probability {mean:.3f}\n"
        f"layers keep {min(shares):.0%} to {max(shares):.0%} of their neurons; bytes read {trace['weights_read']:.1%}; "
        f"memory {trace['memory'] / 10**6:.2f} MB, of which "
        f"{trace['state_bytes'] / 10**6:.2f} MB are this sequence's\n"
        f"alarms after tokens: {', '.join(map(str, alarms or '-'))}; re-masks: {len(overlaps)}"
        f"{f', which keep at least {min(overlaps):.0%} of the mask' if overlaps else ''}"
    )
