"""The plan of batches: which rows run together, and which contexts share a prefix. It needs no model.

The assumed cost of a forward is its padded tokens (rows x width) plus `Budget.forward`, for reading weights and
starting kernels. Batches and prefixes are chosen to make the sum small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dart_eval.layers.projection import input_device

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CANDIDATES_PER_CONTEXT = 4  # candidate rows per forward, in multiples of the batch size
SHORTEST_PREFIX = 32  # tokens; a shorter prefix saves less than its bookkeeping costs
# `auto`. On a CPU matrix products are as fast per token at some hundred tokens as they ever get, and larger batches
# only pad more; a forward of the demo model takes 105 ms and 1.4 ms per token there. On a GPU a quarter of the free
# memory goes into one forward's tokens (the rest: the cache's copies for candidates, logits, a method's state), as a
# power of two, so that a little more or less free memory changes nothing.
CPU_TOKENS, CPU_FORWARD = 1024, 64
GPU_SHARE, GPU_LEAST, GPU_MOST, GPU_FORWARD = 0.25, 1024, 1 << 16, 512
MOST_ROWS = 128  # of contexts or candidates in a forward under `auto`
CACHED_TOKENS = 8  # tokens in a forward's KV cache, in multiples of its own tokens: candidates copy their contexts'


class Budget(NamedTuple):
    """The largest size of a forward. A single row always runs, however long.

    Attributes:
        rows: contexts per forward.
        candidates: candidate rows per forward.
        tokens: padded tokens per forward; None for any number.
        forward: cost of a forward beside its tokens, in tokens.
        generated: tokens, prompts and new ones, of a batch that generates; None for any number.
    """

    rows: int
    candidates: int
    tokens: int | None
    forward: int
    generated: int | None = None

    @property
    def cached(self) -> int | None:
        """Tokens in the KV cache of one forward; None for any number."""
        return None if self.tokens is None else CACHED_TOKENS * self.tokens

    @property
    def can_shrink(self) -> bool:
        """Whether `halved` would be smaller."""
        return max(self.rows, self.candidates) > 1

    def halved(self) -> Budget:
        """Return a budget of half the size."""
        sizes = {name: size for name, size in self._asdict().items() if name != "forward" and size is not None}
        return self._replace(**{name: max(1, size // 2) for name, size in sizes.items()})


def budget(batch_size: int | str, model: PreTrainedModel) -> Budget:
    """Return the budget for a batch size on the model's devices (`auto`: see the constants above)."""
    device = input_device(model)
    gpu = device.type != "cpu"
    forward = GPU_FORWARD if gpu else CPU_FORWARD
    if isinstance(batch_size, int):
        return Budget(batch_size, CANDIDATES_PER_CONTEXT * batch_size, None, forward)
    if batch_size != "auto":
        raise ValueError(batch_size)
    tokens = CPU_TOKENS
    if device.type == "cuda":
        # With several cards, the fullest one sets the size, as each holds its layers' share.
        cards = {p.device for p in model.parameters()}
        tokens = gpu_tokens(min(torch.cuda.mem_get_info(card)[0] for card in cards), token_bytes(model))
    elif gpu:  # other accelerators do not report free memory
        tokens = GPU_LEAST
    # Rows that generate read the weights together, token after token: on a CPU that is worth a larger prompt forward.
    generated = tokens if gpu else CACHED_TOKENS * tokens
    return Budget(MOST_ROWS, MOST_ROWS, tokens, forward, generated)


def gpu_tokens(free: int, per_token: int) -> int:
    """Return the tokens per forward that fit into `free` bytes: a power of two between GPU_LEAST and GPU_MOST."""
    fitting = max(1, int(GPU_SHARE * free / per_token))
    return min(max(1 << (fitting.bit_length() - 1), GPU_LEAST), GPU_MOST)


def token_bytes(model: PreTrainedModel) -> int:
    """Return the bytes per token of a forward: its KV cache with copies, and roughly the activations of a layer."""
    config = model.config.get_text_config()
    heads = _largest(config, "num_key_value_heads") or config.num_attention_heads
    head = _largest(config, "head_dim") or config.hidden_size // config.num_attention_heads
    size = next(model.parameters()).element_size()
    inner = _largest(config, "intermediate_size") or 4 * config.hidden_size
    cache = 2 * config.num_hidden_layers * heads * head * size
    return cache * (1 + CACHED_TOKENS) + 4 * (4 * inner + 8 * config.hidden_size)


def _largest(config: PretrainedConfig, name: str) -> int | None:
    """Return a size from a configuration, or the largest one if layers differ (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers: there is no one value
        return max(getattr(config.per_layer_config[i], name) for i in range(config.num_hidden_layers))


def batches(
    lengths: Sequence[int], rows: int, tokens: int | None = None, forward: int = 0, padded: bool = True
) -> list[slice]:
    """Cut rows, longest first, into batches with the least padded tokens + `forward` per batch.

    Args:
        lengths: of the rows, in falling order.
        rows: most rows per batch.
        tokens: most rows x longest, except for single rows.
        forward: see `Budget`.
        padded: whether rows of different lengths may run together (`cache.can_pad`). Those without tokens never run
            beside others.
    """
    n = len(lengths)
    best, start = [0] * (n + 1), [0] * (n + 1)  # of the first j rows: least cost; where their last batch begins
    for j in range(1, n + 1):
        best[j] = -1
        for i in range(j - 1, max(-1, j - 1 - rows), -1):
            size, shortest = (j - i) * lengths[i], lengths[j - 1]
            together = lengths[i] == shortest or (padded and shortest > 0)
            if not together or (tokens is not None and size > tokens and j - i > 1):
                break  # longer batches begin with rows at least as long
            cost = best[i] + size + forward
            if best[j] < 0 or cost <= best[j]:
                best[j], start[j] = cost, i
    parts = []
    while n:
        parts.append(slice(start[n], n))
        n = start[n]
    return parts[::-1]


class Group(NamedTuple):
    """Contexts (indices) that share their first `prefix` tokens, computed once; 0: no shared prefix."""

    prefix: int
    members: list[int]


def shared_prefixes(contexts: Sequence[tuple[int, ...]], forward: int, least: int = 1) -> list[Group]:
    """Group contexts by long shared prefixes, so that most tokens are saved.

    A context is in one group. A prefix costs a forward of its own: it is shared if it has SHORTEST_PREFIX tokens and
    saves more than `forward`.

    Args:
        contexts: token ids; distinct.
        least: last tokens of every context that are always computed.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    ranges = _best_ranges([contexts[i] for i in order], forward)
    groups, rest = [], set(order)
    for prefix, first, last in ranges:
        members = order[first:last]
        saved = sum(min(prefix, len(contexts[i]) - least) for i in members) - prefix
        if saved > forward:
            groups.append(Group(prefix, members))
            rest.difference_update(members)
    return groups + ([Group(0, sorted(rest))] if rest else [])


def _best_ranges(ordered: Sequence[tuple[int, ...]], forward: int) -> list[tuple[int, int, int]]:
    """Return (prefix, first, last): disjoint ranges of sorted contexts that save the most tokens.

    Sorted contexts with a common prefix form a range, and ranges are nested: a tree, walked from its leaves up with a
    stack. Each node takes its own prefix, or its children's, whichever saves more.
    """
    stack: list[tuple[int, int, list[tuple[int, int, int]], int]] = [(0, 0, [], 0)]  # prefix, first, taken, saved
    for last in range(1, len(ordered) + 1):
        depth = common_prefix(ordered[last - 1], ordered[last]) if last < len(ordered) else 0
        first: int = last - 1
        taken: list[tuple[int, int, int]] = []
        saved = 0
        while stack[-1][0] > depth:
            prefix, first, inner, inner_saved = stack.pop()
            inner.extend(taken)
            inner_saved += saved
            own = (last - first - 1) * prefix - forward if prefix >= SHORTEST_PREFIX else 0
            taken, saved = ([(prefix, first, last)], own) if own > inner_saved else (inner, inner_saved)
        if stack[-1][0] == depth:
            prefix, first, inner, inner_saved = stack.pop()
            inner.extend(taken)
            stack.append((prefix, first, inner, inner_saved + saved))
        else:
            stack.append((depth, first, taken, saved))
    return stack[0][2]


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
