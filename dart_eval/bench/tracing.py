"""One prompt under a method, step by step: the detector's values, and the times and sizes of mask changes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dart_eval.bench.decode import check_length
from dart_eval.evaluation.tasks import Tasks
from dart_eval.layers.families import cache_argument
from dart_eval.layers.finite import refuse_not_finite
from dart_eval.pruning.calibration.calibration import Calibration
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.prune import prune
from dart_eval.util.errors import UserError

SCHEMA = 1


@dataclass(frozen=True)
class Passage:
    """What is traced: a prompt, then a text that is fed token by token; without one the model writes it itself.

    Attributes:
        switch: the text is on another topic than the prompt.
    """

    prompt: str
    then: str | None = None
    switch: bool = False


def smoke_passage(number: int) -> Passage:
    """Return the shipped two-topic document of a number (task `drift_smoke`).

    Raises:
        UserError: there is no such document.
    """
    (task,) = Tasks().load("drift_smoke")
    docs = list(task.eval_docs)
    if not 0 <= number < len(docs):
        raise UserError(f"there is no smoke document {number}", f"0 to {len(docs) - 1}")
    return Passage(docs[number]["context"], docs[number]["rest"], switch=True)


@torch.no_grad()
def trace(
    model: PreTrainedModel, tokenizer: Any, method: Pruner, sparsity: float, passage: Passage, tokens: int = 200
) -> dict[str, Any]:
    """Run a passage under a method: the prompt dense, then at most `tokens` tokens pruned.

    Args:
        tokenizer: of the model.
        sparsity: the share of FFN weights that a token does not read.
        passage: the prompt and, perhaps, its continuation.
        tokens: the most tokens after the prompt.

    Returns:
        Plain data: `method`, `params`, `sparsity`, `prompt_tokens`, `switch`; `tokens` (decoded, as text) and
        `logprobs` (natural log, of each); `layers`: neurons kept (`kept`) of `sizes`; `detector` (window, mean,
        deviation, threshold, signal per window, alarms; or null); `remasks`: token, overlap of the old and the
        new mask per layer, 1 where nothing changed; `effective_sparsity`, `weights_read`, `state_bytes`.

    Raises:
        UserError: the prompt or the text is too short or too long, the method makes no mask from a prompt, or a
            log-probability is NaN or infinite.
    """
    if method.mask.fixed or method.looks_ahead:
        raise UserError(
            f"method {method.name} makes no mask from a prompt", "trace a method that does, such as griffin or dart"
        )
    device: Any = model.get_input_embeddings().weight.device
    prompt = torch.tensor([tokenizer(passage.prompt)["input_ids"]], device=device)
    if prompt.shape[1] < 2:
        raise UserError("the prompt has fewer than two tokens", "give a longer text")
    text_ids = None
    if passage.then is not None:
        text_ids = _following(tokenizer, passage.prompt, passage.then)[:tokens]
        if not text_ids:
            raise UserError("the text after the prompt has no token", "give a longer text, or let the model write it")
    count = tokens if text_ids is None else len(text_ids)
    check_length(model, prompt.shape[1] + count, "prompt and text", "give shorter ones, or fewer --tokens")
    with prune(model, method, sparsity, calibration=Calibration(model, tokenizer), execution="masked") as session:
        decoded, logprobs = _decode(model, prompt, text_ids, count)
        state = session.state
        assert state is not None
        detector = session.trace(0)
        if detector is not None:
            del detector["remasks"]
        return {
            "schema": SCHEMA, "method": method.name, "params": method.params(), "sparsity": sparsity,
            "prompt_tokens": prompt.shape[1], "switch": passage.switch,
            "tokens": [tokenizer.decode([t]) for t in decoded], "logprobs": logprobs,
            "layers": {"kept": state.mask_counts[0].tolist(), "sizes": [f.size for f in session.ffns]},
            "detector": detector,
            "remasks": [{k: e[k] for k in ("token", "overlap")} for e in session.events],
            "effective_sparsity": session.effective_sparsity, "weights_read": session.weights_read,
            "state_bytes": session.state_bytes,
        }  # fmt: skip


def _decode(
    model: PreTrainedModel, prompt: torch.Tensor, text_ids: list[int] | None, count: int
) -> tuple[list[int], list[float]]:
    """Read a prompt, then `count` tokens one by one: those of `text_ids`, or the model's own until it ends.

    Returns:
        The tokens after the prompt, and the natural log of each one's probability.
    """
    name = cache_argument(model)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(ends if isinstance(ends, list) else [ends])
    decoded, logprobs = [], []
    out = model(prompt, use_cache=True, logits_to_keep=1)
    for step in range(count):
        scores = out.logits[0, -1].float().log_softmax(-1)
        token = int(scores.argmax()) if text_ids is None else text_ids[step]
        decoded.append(token)
        refuse_not_finite(scores[token], "log-probabilities of a token", model.dtype)
        logprobs.append(float(scores[token]))
        if text_ids is None and token in ends:
            break
        if len(decoded) == count:
            break  # the token after the last is not needed
        cache = getattr(out, "cache", None) or out.past_key_values
        out = model(torch.tensor([[token]], device=prompt.device), use_cache=True, **{name: cache})
    return decoded, logprobs


def _following(tokenizer: Any, prompt: str, then: str) -> list[int]:
    """Return the tokens of `then` after the prompt (a tokenizer may join the two differently than alone)."""
    whole, first = tokenizer(prompt + then)["input_ids"], tokenizer(prompt)["input_ids"]
    if whole[: len(first)] == first:
        return list(whole[len(first) :])
    return list(tokenizer(then, add_special_tokens=False)["input_ids"])


def summary(trace: dict[str, Any]) -> str:
    """Return a summary of a trace, a few lines for a terminal."""
    kept, sizes = trace["layers"]["kept"], trace["layers"]["sizes"]
    shares = [k / n for k, n in zip(kept, sizes, strict=True)]
    lines = [
        f"{trace['method']} at sparsity {trace['sparsity']:g}: a prompt of {trace['prompt_tokens']} tokens, then "
        f"{len(trace['tokens'])}{' on another topic' if trace['switch'] else ''}, whose mean log-probability is "
        f"{sum(trace['logprobs']) / len(trace['logprobs']):.3f}",
        f"Layers keep {min(shares):.0%} to {max(shares):.0%} of their neurons; a pruned token reads "
        f"{trace['weights_read']:.1%} of the FFN weights. Effective sparsity: "
        f"{trace['effective_sparsity']:.3f}. State: {trace['state_bytes'] / 10**6:.2f} MB",
    ]
    detector = trace["detector"]
    if detector is None:
        lines.append("The detector has closed no window")
    else:
        numbers = detector["signal"]
        mean = f"prompt mean {detector['mean']:.3f}, " if "mean" in detector else ""
        where = f" after token {', '.join(map(str, detector['alarms']))}" if detector["alarms"] else ""
        threshold = detector["threshold"]
        limit = "no threshold, the prompt has no full window" if threshold is None else f"threshold {threshold:.3f}"
        lines.append(
            f"Detector: {len(numbers)} windows of {detector['window']} tokens, cosines from {min(numbers):.3f} to "
            f"{max(numbers):.3f} ({mean}{limit}); {len(detector['alarms'])} alarms{where}"
        )
    if trace["remasks"]:
        overlaps = [sum(r["overlap"]) / len(r["overlap"]) for r in trace["remasks"]]
        lines.append(
            f"Re-masked {len(overlaps)} times; a new mask shares {min(overlaps):.0%} to {max(overlaps):.0%} with the "
            "one before"
        )
    else:
        lines.append("Never re-masked")
    return re.sub(r"\b1 (windows|alarms|times)", lambda m: f"1 {m[1][:-1]}", "\n".join(lines))
