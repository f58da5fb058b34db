"""The checks of `gpu_check.py`: each gets `dry` and returns its numbers, `said` being those for people.

Models have random weights of known shapes, so nothing is downloaded. What is compared runs on the same weights and the
same given tokens, within tolerances that follow from the dtype (`gpu_models`). What pruning itself moves is much more,
and is told beside it: a comparison that could not see pruning would show nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import time
from typing import Any

import torch
from gpu_column import column, sweep
from gpu_models import (
    PROMPT,
    RESTLESS,
    SPARSITY,
    STEPS,
    Skip,
    apart,
    card,
    large,
    logits_of,
    pruned,
    require,
    rounded,
    small,
    tokens_for,
    tolerance,
)
from gpu_speeds import decode_compiled, decode_eager, decode_graph, ffn, rate
from transformers import PreTrainedModel

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.prune import prune
from dart_eval.pruning.registry import make
from dart_eval.pruning.session.dense import DenseSession

__all__ = [
    "Skip", "card", "column", "decode_compiled", "decode_eager", "decode_graph", "ffn", "rate", "sweep",
]  # fmt: skip


# -- is it right ---------------------------------------------------------------------------------------------------


def parity(dry: bool) -> dict[str, Any]:
    """In float16 and bfloat16, dense and under one mask, as in float32 with the same weights; every bit comes back."""
    model, numbers = small(dry), {}
    for dtype in (torch.float16, torch.bfloat16):
        low, high = rounded(model, dtype)
        before = {name: p.clone() for name, p in low.named_parameters()}
        most, name = tolerance(low, dtype), str(dtype).removeprefix("torch.")
        dense = logits_of(high)
        numbers[f"{name} dense"] = apart(logits_of(low), dense)
        require(numbers[f"{name} dense"], most, f"dense, {name} and float32")
        ours, theirs = (pruned(m, "magnitude", "copied")[0] for m in (low, high))
        numbers[f"{name} pruned"], numbers[f"{name} pruning moves"] = apart(ours, theirs), apart(theirs, dense)
        require(numbers[f"{name} pruned"], most, f"pruned, {name} and float32")
        if numbers[f"{name} pruning moves"] < 3 * most:
            raise AssertionError("pruning moves the logits too little to be seen")
        if not all(torch.equal(before[n], p) for n, p in low.named_parameters()):
            raise AssertionError(f"{name}: prune() did not put the weights back")
    numbers["said"] = f"fp16 {numbers['float16 pruned']:.1g}, bf16 {numbers['bfloat16 pruned']:.1g} from float32"
    return numbers


def executions(dry: bool) -> dict[str, Any]:
    """masked = copied: in float32 to its digits, in bfloat16 to its own."""
    numbers: dict[str, Any] = {}
    model = small(dry)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, tolerance(model, torch.bfloat16))):
        low = copy.deepcopy(model).to(dtype)
        for method, params in (("griffin", {}), ("dart", RESTLESS)):
            ours, session = pruned(low, method, "copied", **params)
            theirs, reference = pruned(low, method, "masked", **params)
            name = f"{method} {str(dtype).removeprefix('torch.')}"
            numbers[name] = apart(ours, theirs)
            require(numbers[name], most, f"{name}, copied and masked")
            if [e["token"] for e in session.events] != [e["token"] for e in reference.events]:
                raise AssertionError(f"{name}: re-masks came at other tokens")
            if params and not session.events:
                raise AssertionError(f"{name}: no mask changed")
    low = copy.deepcopy(model)
    texts = []
    for execution in ("masked", "copied"):
        with prune(low, make("dart", RESTLESS), SPARSITY, execution=execution):
            texts.append(low.generate(tokens_for(low, PROMPT), max_new_tokens=STEPS, do_sample=False))
    if not torch.equal(*texts):
        raise AssertionError("generate says something else on copies than by masks")
    numbers["said"] = f"dart {numbers['dart float32']:.1g} apart in float32"
    return numbers


def flash(dry: bool) -> dict[str, Any]:
    """Attention by flash kernels, torch's own and the package's where present: dense and pruned as by plain ones."""
    if dry:
        raise Skip("flash attention needs a CUDA GPU")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, numbers = small(dry).to(torch.bfloat16), {}
    most = tolerance(model, torch.bfloat16)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    expected = [logits_of(plain), pruned(plain, "magnitude", "copied")[0]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = {"sdpa": [logits_of(model), pruned(model, "magnitude", "copied")[0]]}
    if importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
        found["flash_attn"] = [logits_of(model), pruned(model, "magnitude", "copied")[0]]
    for name, pair in found.items():
        for what, ours, theirs in zip(("dense", "pruned"), pair, expected, strict=True):
            numbers[f"{name} {what}"] = apart(ours, theirs)
            require(numbers[f"{name} {what}"], most, f"{name}, {what}")
    absent = "" if "flash_attn" in found else "; flash_attn is not installed"
    return {**numbers, "said": f"torch's {numbers['sdpa pruned']:.1g} apart{absent}"}


def compiled_as_eager(dry: bool, mode: str) -> dict[str, Any]:
    """Dense and pruned steps through torch.compile as without it, over masks that change."""
    import torch._dynamo

    if dry and mode != "default":
        raise Skip("CUDA graphs need a CUDA GPU")
    model = small(dry, layers=2)
    options: dict[str, Any] = {"backend": "eager"} if dry else {"mode": mode}
    numbers: dict[str, Any] = {}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for name, params in (("dense", {}), ("griffin", {}), ("dart", RESTLESS)):
            torch._dynamo.reset()
            forward = torch.compile(model, **options)
            if name == "dense":
                numbers[name] = apart(logits_of(model, forward, fixed=True), logits_of(model, fixed=True))
            else:
                found = []
                for decodes in (forward, None):
                    with prune(model, make(name, params), SPARSITY, execution="copied") as session:
                        found.append(logits_of(model, decodes, fixed=True))
                if params and not session.events:
                    raise AssertionError("no mask changed")
                numbers[name] = apart(*found)
            require(numbers[name], 1e-4, f"{name}, compiled ({mode}) and eager, in float32")
    worst = max(numbers.values())
    return {**numbers, "said": f"{worst:.1g} from eager" + (" (dry: only traced)" if dry else "")}


compile, graphs = (functools.partial(compiled_as_eager, mode=mode) for mode in ("default", "reduce-overhead"))


# -- is it fast ----------------------------------------------------------------------------------------------------


def scoring(dry: bool) -> dict[str, Any]:
    """Answers scored a second, dense and pruned, four to a context; dense ones as a plain forward gives them."""
    model, about = large(dry)
    head, vocabulary = output_head(model), model.config.vocab_size
    draw = torch.Generator().manual_seed(2)

    def text(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())

    contexts = [text(16, 32) if dry else text(96, 256) for _ in range(3 if dry else 96)]
    requests = [Request(context, text(2, 12)) for context in contexts for _ in range(4)]
    length, numbers = sum(len(c) for c in contexts) + sum(len(r.continuation) for r in requests), {}
    for name in ("dense", "griffin", "dart"):
        with prune(model, name, SPARSITY) as session, torch.no_grad():
            score = scorer(model, head, session if session.prunes else DenseSession(), "auto").score
            score(requests[:4])
            begun = time.perf_counter()
            answers = score(requests)
            numbers[f"{name} tokens/s"] = round(length / (time.perf_counter() - begun), 1)
        if not all(math.isfinite(a.logprob) for a in answers):
            raise AssertionError(f"{name}: a log-likelihood is not finite")
        if name == "dense":
            numbers["from a plain forward"] = max(
                abs(a.logprob - plain_logprob(model, r)) / len(r.continuation)
                for a, r in zip(answers[:8], requests[:8], strict=True)
            )
            # In bfloat16 a log-probability of about log V is known to some rounding steps of that size.
            require(numbers["from a plain forward"], 16 * torch.finfo(torch.bfloat16).eps, "nats a token, dense")
    said = ", ".join(f"{k} {v:.0f}" for k, v in numbers.items() if k.endswith("/s"))
    return {**about, "answers": len(requests), **numbers, "said": said}


@torch.no_grad()
def plain_logprob(model: PreTrainedModel, request: Request) -> float:
    """Of a continuation, by one forward of everything."""
    ids = torch.tensor([request.context + request.continuation], device=model.device)
    logs = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
    start = len(request.context) - 1
    return float(logs[start:].gather(1, ids[0, start + 1 :, None]).sum())
