"""From hidden states to log-probabilities: the output head runs once per requested position.

Continuations of one context with a common beginning share positions: the nodes of a tree whose edges are tokens. The
head runs on hidden states gathered from several forwards, a few at a time, since logits are wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dart_eval.evaluation.costs import Apart, Distance, divergences
from dart_eval.evaluation.states import States, begin_name, with_token

LOGIT_BYTES = 256 << 20  # of fp32 logits held at a time
SOFTMAX_PARTS = 4  # parts that are normalised one after the other, as a softmax writes as much again
COMPARED = 8  # positions compared at a time; more do not fit into a processor's caches, and take twice as long


class Answers:
    """Log-probabilities of the continuations of several contexts.

    `ask` returns the nodes that predict a continuation's tokens. `give` takes the hidden states of nodes;
    then `logprobs` and `greedy` answer, and with dense's states `distance`.

    Args:
        head: hidden states [n, D] -> logits [n, V].
        states: of dense, to be compared with or still to be gathered; None: neither.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], vocabulary: int, states: States | None = None) -> None:
        self.head, self.vocabulary, self.states = head, vocabulary, states
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        self._names: list[hashlib.blake2b | None] = []  # of nodes among dense's states
        self._wanted: list[set[int]] = []  # per node: requested tokens
        self._hidden: dict[int, Tensor] = {}  # nodes whose head has not run: [D]
        self._results: dict[tuple[int, int], tuple[float, bool]] = {}  # (node, token) -> log-probability, the likeliest
        self._apart: dict[int, tuple[float, float, bool]] = {}  # node -> KL, the reverse, the same likeliest token
        self._moved: dict[tuple[int, int], float] = {}  # (node, token) -> its probability - that by dense

    def root(self, context: Sequence[int] = (), angles: int = 0) -> int:
        """Begin a tree: return the node that predicts the first token after a context (see `states.begin_name`)."""
        return self._node(begin_name(context, angles) if self.states else None)

    def _node(self, name: hashlib.blake2b | None) -> int:
        self._wanted.append(set())
        self._names.append(name)
        return len(self._wanted) - 1

    def ask(self, root: int, continuation: Sequence[int]) -> list[int]:
        """Request the probability of every token; return the node of each."""
        path, node = [], root
        for k, token in enumerate(continuation):
            path.append(node)
            self._wanted[node].add(token)
            if k + 1 < len(continuation):
                if (node, token) not in self._children:
                    name = self._names[node]
                    self._children[node, token] = self._node(name and with_token(name, token))
                node = self._children[node, token]
        return path

    def give(self, nodes: Sequence[int], hidden: Tensor) -> None:
        """Set the hidden states [n, D] of n nodes; nodes that have one keep it."""
        for node, state in zip(nodes, hidden, strict=True):
            self._hidden.setdefault(node, state)

    def run(self) -> None:
        """Run the head on the hidden states."""
        todo = [node for node in self._hidden if self._wanted[node]]
        per = max(1, LOGIT_BYTES // (4 * self.vocabulary))
        for first in range(0, len(todo), per):
            part = todo[first : first + per]
            hidden = torch.stack([self._hidden[node] for node in part])
            logits = self.head(hidden).float()  # [n, V]
            best = logits.argmax(1).tolist()
            wanted = [(row, token) for row, node in enumerate(part) for token in sorted(self._wanted[node])]
            values: list[float] = []
            step = max(1, -(-per // SOFTMAX_PARTS))
            for start in range(0, len(part), step):
                # log_softmax as in stock lm-eval: over 262 144 words in fp32 it is off by 1e-4 against fp64, and
                # logsumexp by 2e-5; equal numbers matter more here than the last digit.
                logprobs = logits[start : start + step].log_softmax(1)
                mine = [(row - start, token) for row, token in wanted if start <= row < start + step]
                rows, tokens = (torch.tensor(ids, device=logits.device) for ids in zip(*mine, strict=True))
                found = logprobs[rows, tokens]
                values += found.tolist()
                if self.states and self.states.known:
                    some = slice(start, start + step)
                    self._measure(part[some], logits[some], best[some], rows, tokens, found.exp())
            if self.states and self.states.gathering:
                self.states.keep(self._named(part), hidden)
            for (row, token), value in zip(wanted, values, strict=True):
                self._results[part[row], token] = value, best[row] == token
            del logits, logprobs  # before the next part's come: they are what a forward's memory peaks at
        self._hidden.clear()

    def _named(self, nodes: Sequence[int]) -> list[bytes]:
        """Return the names of nodes among dense's states."""
        return [name.digest() for node in nodes if (name := self._names[node])]

    def _measure(
        self, nodes: Sequence[int], logits: Tensor, best: Sequence[int], rows: Tensor, tokens: Tensor, likely: Tensor
    ) -> None:
        """Measure the distances of nodes from dense.

        Args:
            logits: [n, V] fp32 of n nodes. best: their likeliest tokens.
            rows, tokens: of `logits`, the requested ones. likely: probability of each.
        """
        assert self.states is not None
        dense = self.head(self.states.find(self._named(nodes)).to(logits.device)).float()
        likeliest = dense.argmax(1).tolist()
        for start in range(0, len(nodes), COMPARED):
            some = slice(start, start + COMPARED)
            both = zip(*(far.tolist() for far in divergences(dense[some], logits[some])), strict=True)
            for row, (kl, reverse) in enumerate(both, start):
                self._apart[nodes[row]] = kl, reverse, best[row] == likeliest[row]
        moved = likely - (dense[rows, tokens] - dense.logsumexp(1)[rows]).exp()
        for row, token, by in zip(rows.tolist(), tokens.tolist(), moved.tolist(), strict=True):
            self._moved[nodes[row], token] = by

    def distance(self, path: Sequence[int], continuation: Sequence[int]) -> Distance:
        """Return the distance from dense at the nodes of one continuation; empty without dense's states."""
        steps = zip(path, continuation, strict=True) if self._apart else ()
        return Distance.of([Apart(*self._apart[node], self._moved[node, token]) for node, token in steps])

    def logprobs(self, path: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Return the natural-log probability of each token."""
        return [self._results[at][0] for at in zip(path, continuation, strict=True)]

    def greedy(self, path: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether every token was the most likely one."""
        return all(self._results[at][1] for at in zip(path, continuation, strict=True))
