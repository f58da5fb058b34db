"""Which tokens of a forward are real, read off the attention mask in whatever form a decoder is handed it.

A padded position is one that no query may look at, itself included; a real token always sees itself. So a mask of two
dimensions names real tokens by their place, and one of four dimensions (or a function, as flex attention has it) by the
entry where a token's query meets its own key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dart_eval.util.errors import UserError

REMEDY = "pass attention_mask of shape [batch, cached and new tokens]"


def real_tokens(mask: Any, cache: Any, past: int, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, T] bool: the new tokens that are no padding.

    Args:
        mask: as the decoder is handed it: None, one mask, or one for each type of layer.
        cache: the KV cache before the forward, or None; past: tokens in it.
        batch, length, device: B, T, and where the answer lies.

    Raises:
        UserError: the mask has a form in which padding cannot be told.
    """
    kind = None
    if isinstance(mask, dict):
        # A mask that is left out is a plain causal one, which is never done where there is padding.
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


def _offset(cache: Any, width: int, length: int, kind: str | None) -> int:
    """The place of the token that a mask's first column stands for: caches of sliding windows drop the oldest."""
    for layer in sorted(getattr(cache, "layers", ()), key=lambda layer: bool(getattr(layer, "is_sliding", False))):
        if kind is not None and getattr(layer, "is_sliding", False) == (kind == "full_attention"):
            continue
        if hasattr(layer, "get_mask_sizes"):
            columns, offset = layer.get_mask_sizes(length)
            if columns == width:
                return int(offset)
    return 0


def _own_entries(mask: Any, start: int, length: int) -> Tensor:
    """[B or 1, T] bool: whether each new token may look at itself; its key is in column start + t."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, start : start + length] > 0
    if not isinstance(mask, Tensor):  # flex attention: a function of batch, head, query and key
        rows = torch.arange(mask.shape[0], device=mask.kv_num_blocks.device)[:, None]
        queries = torch.arange(length, device=rows.device)[None]
        return mask.mask_mod(rows, torch.zeros_like(rows), queries, queries + start).expand(mask.shape[0], length)
    own = mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
