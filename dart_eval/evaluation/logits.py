"""From hidden states to log-probabilities: the output head runs once per requested position.

Continuations of one context with a common beginning share positions: the nodes of a tree whose edges are tokens. The
head runs on hidden states gathered from several forwards, a few at a time, since logits are wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dart_eval.evaluation.costs import Distance, divergence

LOGIT_BYTES = 256 << 20  # of fp32 logits held at a time
SOFTMAX_PARTS = 4  # parts that are normalised one after the other, as a softmax writes as much again
COMPARED = 8  # positions compared at a time; more do not fit into a processor's caches, and take twice as long


class Answers:
    """Log-probabilities of the continuations of several contexts.

    `ask` returns the nodes that predict a continuation's tokens. `give` takes the hidden states of nodes;
    then `logprobs` and `greedy` answer. With `distances`, `compare` takes dense's hidden states at the nodes, and
    `distance` answers; other nodes count as dense.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], vocabulary: int, distances: bool = False) -> None:
        self.head, self.vocabulary, self.distances = head, vocabulary, distances
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        self._wanted: list[set[int]] = []  # per node: requested tokens
        self._hidden: dict[int, Tensor] = {}  # nodes whose head has not run: [D]
        self._results: dict[tuple[int, int], tuple[float, bool]] = {}  # (node, token) -> log-probability, the likeliest
        self._dense: dict[int, Tensor] = {}  # nodes that have not been compared with dense: its hidden state
        self._apart: dict[int, tuple[float, bool]] = {}  # node -> its KL, and whether the likeliest token is dense's

    def root(self) -> int:
        """Begin a tree: return the node that predicts a first token."""
        self._wanted.append(set())
        return len(self._wanted) - 1

    def ask(self, root: int, continuation: Sequence[int]) -> list[int]:
        """Request the probability of every token; return the node of each."""
        path, node = [], root
        for k, token in enumerate(continuation):
            path.append(node)
            self._wanted[node].add(token)
            if k + 1 < len(continuation):
                if (node, token) not in self._children:
                    self._children[node, token] = self.root()
                node = self._children[node, token]
        return path

    def give(self, nodes: Sequence[int], hidden: Tensor) -> None:
        """Set the hidden states [n, D] of n nodes; nodes that have one keep it."""
        for node, state in zip(nodes, hidden, strict=True):
            self._hidden.setdefault(node, state)

    def compare(self, nodes: Sequence[int], dense: Tensor) -> None:
        """Set dense's hidden states [n, D] at n nodes; nodes that have one keep it."""
        for node, state in zip(nodes, dense, strict=True):
            self._dense.setdefault(node, state)

    def run(self) -> None:
        """Run the head on the hidden states."""
        todo = [node for node in self._hidden if self._wanted[node]]
        per = max(1, LOGIT_BYTES // (4 * self.vocabulary))
        for first in range(0, len(todo), per):
            part = todo[first : first + per]
            logits = self.head(torch.stack([self._hidden[node] for node in part])).float()  # [n, V]
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
                values += logprobs[rows, tokens].tolist()
                self._measure(part[start : start + step], logits[start : start + step], best[start : start + step])
            for (row, token), value in zip(wanted, values, strict=True):
                self._results[part[row], token] = value, best[row] == token
            del logits, logprobs  # before the next part's come: they are what a forward's memory peaks at
        self._hidden.clear()
        self._dense.clear()

    def _measure(self, nodes: Sequence[int], logits: Tensor, best: Sequence[int]) -> None:
        """Measure the distance of nodes from dense. logits: [n, V] fp32 of n nodes; best: their likeliest tokens."""
        rows = [row for row, node in enumerate(nodes) if node in self._dense]
        if not rows:
            return
        dense = self.head(torch.stack([self._dense[nodes[row]] for row in rows])).float()
        likeliest, kl = dense.argmax(1).tolist(), []
        for start in range(0, len(rows), COMPARED):
            some = slice(start, start + COMPARED)
            kl += divergence(dense[some], logits[rows[some]]).tolist()
        for row, far, token in zip(rows, kl, likeliest, strict=True):
            self._apart[nodes[row]] = far, best[row] == token

    def distance(self, path: Sequence[int]) -> Distance:
        """Return the distance from dense at the nodes of one continuation; empty without `distances`."""
        return Distance.of([self._apart.get(node, (0.0, True)) for node in path] if self.distances else [])

    def logprobs(self, path: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Return the natural-log probability of each token."""
        return [self._results[at][0] for at in zip(path, continuation, strict=True)]

    def greedy(self, path: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether every token was the most likely one."""
        return all(self._results[at][1] for at in zip(path, continuation, strict=True))
