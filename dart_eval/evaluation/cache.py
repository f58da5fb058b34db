"""KV caches of a batch: new ones, copies for chosen rows, and ones that begin with a prefix computed once."""

from __future__ import annotations

import copy
import inspect
import typing
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import base_of

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache of the class that the model declares (MiniMax). Sliding layers keep only their window."""
    argument = inspect.signature(base_of(model).forward).parameters.get(cache_argument(model))
    kinds = [] if argument is None else [c for c in typing.get_args(argument.annotation) if isinstance(c, type)]
    own = next((c for c in kinds if issubclass(c, DynamicCache) and c is not DynamicCache), None)
    return DynamicCache(config=model.config) if own is None else own()


def _is_plain(cache: Cache) -> bool:
    """Whether a cache holds keys and values per token, and nothing else."""
    return type(cache) is DynamicCache and all(type(layer) in PLAIN for layer in cache.layers)


def fork(cache: Any, rows: Tensor | None = None) -> Any:
    """Return an independent copy for the given rows (indices, repeats allowed; None: all)."""
    if not _is_plain(cache):
        forked = copy.deepcopy(cache)
        if rows is not None and cache.get_seq_length():
            forked.reorder_cache(rows)  # linear attention has no batch_select_indices
            for name, states in vars(forked).items():  # states of a model's own class, beside its layers
                if isinstance(states, list) and name != "layers":
                    states[:] = [s.index_select(0, rows.to(s.device)) if isinstance(s, Tensor) else s for s in states]
        return forked
    # Tensors are replaced, never written to, so the copies may share them.
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    if rows is not None:
        for layer in forked.layers:  # each may be on a device of its own, to which this takes the rows
            layer.reorder_cache(rows)
    return forked


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix do not depend on what follows, and can be rearranged.

    They cannot if layers hold anything but keys and values per token, or attend in chunks, whose borders padding moves.
    """
    if not _is_plain(new_cache(model)):
        return False
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    return not types - {"full_attention", "sliding_attention"} and not getattr(config, "attention_chunk_size", None)


def can_pad(model: PreTrainedModel) -> bool:
    """Whether rows may run with padding on their left; `forwards.output_head` checks it.

    They may not if layers of the cache have the model's own class: DeepSeek V4 pools every few columns, tokens or not.
    """
    return all(type(layer).__module__ == DynamicLayer.__module__ for layer in new_cache(model).layers)


def from_prefix(model: PreTrainedModel, prefix: Any, columns: Tensor) -> DynamicCache:
    """Return a cache whose row b holds, in column c, the prefix's token columns[b, c].

    Args:
        prefix: of one row, with every token in every layer.
        columns: [B, C], any index in range for padding.
    """
    cache = new_cache(model)
    for i, layer in enumerate(prefix.layers):
        at = columns.to(layer.keys.device)
        keys, values = (t[0][:, at].transpose(0, 1) for t in (layer.keys, layer.values))  # [H, B, C, E] -> [B, H, C, E]
        cache.update(keys, values, i)
    return cache
