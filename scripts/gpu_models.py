"""What the checks of `gpu_check.py` compare: models of random weights, their logits, and how far apart these may be.

A tolerance: every layer rounds the stream about eight times in the dtype, each time by up to eps/2 of it, and
independent errors add in squares; twice the sum is allowed, as a share of the logits' norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from dart_eval.layers.families import cache_argument
from dart_eval.models import shapes
from dart_eval.pruning.prune import prune
from dart_eval.pruning.registry import make
from dart_eval.pruning.session.execution import Wanted
from dart_eval.util.machine import timed

SPARSITY = 0.7
# A detector that sees drift in every window, so that masks do change.
RESTLESS = {
    "remask.window": 3, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 5,
}  # fmt: skip
PROMPT, STEPS = 48, 12


class Skip(Exception):
    """Why a check is not run here."""


def card() -> dict[str, Any]:
    """What computes; `card` is None without a GPU."""
    if not torch.cuda.is_available():
        return {"card": None}
    import transformers

    return {
        "card": torch.cuda.get_device_name(0), "memory_gb": round(torch.cuda.mem_get_info(0)[1] / 1e9, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))), "torch": torch.__version__,
        "cuda": torch.version.cuda, "transformers": transformers.__version__,
    }  # fmt: skip


# -- models --------------------------------------------------------------------------------------------------------


def small(dry: bool, layers: int = 4) -> PreTrainedModel:
    """A model in float32 whose FFNs matter: layers as wide as Llama 3.2 1B's, or tiny ones."""
    torch.manual_seed(0)
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    tiny = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes: Any = {**(tiny if dry else wide), "num_hidden_layers": 2 if dry else layers}
    others: Any = {"max_position_embeddings": 1024, "attn_implementation": "sdpa"}
    config = LlamaConfig(vocab_size=320 if dry else 8192, **sizes, **others)
    with torch.device("cpu" if dry else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # as large as a trained model's: variance 1 / inputs, and an embedding of ones
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


def large(dry: bool, copies: float = 2.0) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Llama 3.1 8B's shape in bfloat16, with as many layers as some copies of the FFNs leave room for."""
    if dry:
        tiny: Any = small(dry)
        return tiny.to(torch.bfloat16), {"shape": "tiny", "layers": 2}
    shape = shapes.config("llama-3.1-8b")
    ffn = 3 * shape.hidden_size * shape.intermediate_size * 2
    attention = (2 + 2 * shape.num_key_value_heads / shape.num_attention_heads) * shape.hidden_size**2 * 2
    fixed = 2 * shape.vocab_size * shape.hidden_size * 2 + 4e9  # embeddings, head, and what forwards need
    free, all_layers = torch.cuda.mem_get_info(0)[0], shape.num_hidden_layers
    layers = min(all_layers, int((0.95 * free - fixed) // (copies * ffn + attention)))
    if layers < 1:
        raise Skip(f"{free / 1e9:.0f} GB of free memory do not hold one layer of llama-3.1-8b {copies:g} times")
    about = {"shape": "llama-3.1-8b", "layers": layers}
    if layers < all_layers:
        about["scaled_down"] = f"{layers} of {all_layers} layers: {free / 1e9:.0f} GB of memory were free"
    return shapes.with_random_weights("llama-3.1-8b", layers, torch.bfloat16, "cuda"), about


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model in a dtype, and the same rounded weights in float32."""
    low: Any = copy.deepcopy(model)
    low = low.to(dtype)
    return low, copy.deepcopy(low).to(torch.float32)


def tokens_for(model: PreTrainedModel, count: int, seed: int = 1) -> Tensor:
    """[1, count] random tokens."""
    made = torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
    return made.to(model.device)


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, forward: Callable[..., Any] | None = None, fixed: bool = False, steps: int = STEPS
) -> Tensor:
    """[steps + 1, V] fp32: after a prompt, and after each of so many given tokens.

    forward: what decodes, if not the model itself. fixed: with a KV cache of a fixed size.
    """
    ids, name = tokens_for(model, PROMPT + steps), cache_argument(model)
    cache = {name: StaticCache(config=model.config, max_cache_len=PROMPT + steps)} if fixed else {}
    out = model(input_ids=ids[:, :PROMPT], use_cache=True, **cache)
    found = [out.logits[0, -1].float()]
    for i in range(PROMPT, PROMPT + steps):
        past = cache or {name: getattr(out, name)}
        torch.compiler.cudagraph_mark_step_begin()
        out = (model if forward is None else forward)(input_ids=ids[:, i : i + 1], use_cache=True, **past)
        found.append(out.logits[0, -1].float().clone())  # a CUDA graph writes the next ones to the same place
    return torch.stack(found)


def seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Of one call among many."""

    def often() -> None:
        for _ in range(times):
            run()

    return timed(often, device)[0] / times


def apart(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b; infinite where a number is not finite."""
    found = float((a - b).norm() / b.norm())
    return found if math.isfinite(found) else math.inf


def tolerance(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """See the top of this file."""
    return 2 * (torch.finfo(dtype).eps / 2) * math.sqrt(8 * model.config.num_hidden_layers)


def require(found: float, most: float, what: str) -> None:
    """Raise AssertionError where a difference is more than it may be."""
    if not found <= most:
        raise AssertionError(f"{what}: {found:.2g} apart, at most {most:.2g} is rounding")


def pruned(model: PreTrainedModel, method: str, execution: Wanted, **params: Any) -> tuple[Tensor, Any]:
    """Logits under a method, and its session (left)."""
    with prune(model, make(method, params), SPARSITY, execution=execution) as session:
        return logits_of(model), session
