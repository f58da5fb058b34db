"""What a forward's KV cache and attention mask tell: which tokens are real."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache

REMEDY = "pass attention_mask of shape [batch, cached and new tokens]"


def real_tokens(mask: object, cache: Cache | None, past: int, batch: int, length: int, device: torch.device) -> Tensor:
    """Return [B, T] bool, the new tokens that are not padding.

    Args:
        mask: the decoder's argument: None, one mask, or one per type of layer.
        cache: the KV cache before the forward, or None.
        past: tokens in the cache.
        batch: B.
        length: T.
        device: of the result.

    Raises:
        UserError: the mask has a form that does not show padding.
    """
    kind = None
    if isinstance(mask, dict):
        # A missing mask is a plain causal one, which a padded batch never has.
        kind = next((k for k in ("full_attention", *mask) if mask.get(k) is not None), None)
        mask = None if kind is None else mask[kind]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not hasattr(mask, "shape") or len(mask.shape) not in (2, 4):
        raise UserError(
            f"an attention mask of type {type(mask).__name__} does not tell prune() what is padding", REMEDY
        )
    width = int(mask.shape[-1])
    start = past - _offset(cache, width, length, kind)
    if start < 0 or start + length > width:
        raise UserError(
            f"the attention mask has {width} columns, and the forward has {length} tokens after {past} cached ones",
            REMEDY,
        )
    return _own_entries(mask, start, length).to(device).expand(batch, length)


def _offset(cache: Cache | None, width: int, length: int, kind: str | None) -> int:
    """Return the position of a mask's first column: caches of sliding windows drop the oldest tokens."""
    for layer in sorted(getattr(cache, "layers", ()), key=lambda layer: bool(getattr(layer, "is_sliding", False))):
        if kind is not None and getattr(layer, "is_sliding", False) == (kind == "full_attention"):
            continue
        if hasattr(layer, "get_mask_sizes"):
            columns, offset = layer.get_mask_sizes(length)
            if columns == width:
                return int(offset)
    return 0


def _own_entries(mask: Any, start: int, length: int) -> Tensor:
    """Return [B or 1, T] bool, whether each new token attends to itself; its key is in column start + t."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, start : start + length] > 0
    if not isinstance(mask, Tensor):  # flex attention: a function of batch, head, query and key
        rows = torch.arange(mask.shape[0], device=mask.kv_num_blocks.device)[:, None]
        queries = torch.arange(length, device=rows.device)[None]
        return mask.mask_mod(rows, torch.zeros_like(rows), queries, queries + start).expand(mask.shape[0], length)
    own = mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def cache_in(output: object, model: str) -> Cache:
    """Return the KV cache in the output of a forward. model: its class, for the message.

    Raises:
        UserError: there is none.
    """
    values = output if isinstance(output, (tuple, list)) else vars(output).values()
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    if cache is None:
        raise UserError(
            f"{model} gave no KV cache: under prune() each forward would be a new prompt",
            "leave use_cache on and gradient checkpointing off; prune() needs a model with a KV cache",
        )
    return cache


def check_cache(cache: Cache | None, use_cache: bool | None) -> None:
    """Refuse a forward without KV cache, or with one whose length is unknown.

    Raises:
        UserError: with the reason.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise UserError(
            f"the KV cache is a {type(cache).__name__}, and prune() needs one of transformers' classes",
            "use DynamicCache, or let the model make one",
        )
    if use_cache is False and cache is None:
        raise UserError(
            "under prune() a forward without KV cache would always be a new, dense prompt", "leave use_cache on"
        )
