"""Reordering tensors in their own memory, in steps that an interrupt cannot break.

A step reads what it will write, remembers it, and writes it. Whoever finishes the work after an interrupt writes what
was remembered once more, which changes nothing if it had been written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS = 128  # rows of each side that one step swaps
COLUMN_ROWS = 256  # rows in which one step swaps columns
TILE = 256  # longest side of the squares of an in-place transposition
STRIPS = 8  # of which a matrix has at least so many: one of them is held beside it


@dataclass(frozen=True)
class Step:
    """`write(read())`; write must give the same when it is repeated."""

    read: Callable[[], Tensor]
    write: Callable[[Tensor], object]


class Work:
    """Steps in order, and `done` (which may be called twice) after the last."""

    def __init__(self, steps: Iterable[Step], done: Callable[[], None]) -> None:
        self.steps, self.done = list(steps), done
        # Steps done, and what the next one was about to write (None: not yet read). One assignment moves it on, so an
        # interrupt between any two operations leaves either the old state or the new one.
        self.at: tuple[int, Tensor | None] = (0, None)

    def finish(self) -> None:
        """Do what is left."""
        while self.at[0] < len(self.steps):
            count, values = self.at
            step = self.steps[count]
            if values is None:
                values = step.read()
                self.at = (count, values)
            step.write(values)
            self.at = (count + 1, None)
        self.done()


def to_the_end(work: Callable[[], None]) -> None:
    """Do `work`, and again where an interrupt breaks it (Ctrl-C, or what a signal's handler raises), until it is done.

    Then the first interrupt is raised. `work` must be such that doing it again, from wherever it stopped, completes it.
    An interrupt that comes before or after the loop is raised at once: whoever must have the work done calls this
    twice, the second time in `finally`.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            work()
            break
        except Exception:
            raise
        except BaseException as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt


def swap(tensor: Tensor, dim: int, a: Tensor, b: Tensor) -> Iterator[Step]:
    """Swap entries `a` of the first or second dimension with `b` ([n] long each; no entry twice).

    In pieces, so that what is held beside the tensor stays small.
    """
    if dim == 0:
        for x, y in zip(a.split(PAIRS), b.split(PAIRS), strict=True):
            yield _swap_rows(tensor, torch.cat([x, y]), torch.cat([y, x]))
        return
    here, there = torch.cat([a, b]), torch.cat([b, a])
    for rows in tensor.split(COLUMN_ROWS):
        yield _swap_columns(rows, here, there)


def _swap_rows(tensor: Tensor, here: Tensor, there: Tensor) -> Step:
    def write(values: Tensor) -> None:
        tensor[here] = values  # on a CPU faster than index_copy_

    return Step(lambda: tensor.index_select(0, there), write)


def _swap_columns(rows: Tensor, here: Tensor, there: Tensor) -> Step:
    # On a CPU gather reads columns faster than index_select, index_copy_ writes them faster than the others.
    return Step(lambda: rows.gather(1, there.expand(len(rows), -1)), lambda values: rows.index_copy_(1, here, values))


def involutions(order: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Two rounds of swaps, each of disjoint pairs (entries a with entries b), that sort a permutation of 0 .. n-1.

    Every cycle of a permutation is the product of two reflections.
    """
    rounds: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
    seen = [False] * len(order)
    for start in range(len(order)):
        cycle = []
        i = start
        while not seen[i]:
            seen[i] = True
            cycle.append(i)
            i = order[i]
        n = len(cycle)
        # Entry cycle[k] holds what belongs to cycle[k + 1]: k -> -k, then k -> 1 - k, sends it there.
        for (a, b), turn in zip(rounds, (0, 1), strict=True):
            for k in range(n):
                other = (turn - k) % n
                if k < other:
                    a.append(cycle[k])
                    b.append(cycle[other])
    return rounds


def transpose(memory: Tensor, rows: int, columns: int) -> Iterator[Step]:
    """Turn a [rows, columns] matrix into its transpose, [columns, rows], in its own memory ([rows * columns]).

    The matrix is cut into p x q squares of side g, a common divisor: every strip of p is turned into squares that are
    transposed, squares change places, and every strip of q is put together. A strip is held beside it at a time.
    """
    longest = max(1, min(TILE, rows // STRIPS, columns // STRIPS))
    g = max(d for d in range(1, longest + 1) if math.gcd(rows, columns) % d == 0)
    p, q = rows // g, columns // g
    for strip in memory.split(g * columns):
        yield _rearranged(strip, (g, q, g), (1, 2, 0))
    squares = memory.view(p * q, g * g)  # square (i, j) at i q + j; it belongs at j p + i
    few = max(1, q // 2)  # pairs: a strip again
    for a, b in involutions([(k % q) * p + k // q for k in range(p * q)]):
        for start in range(0, len(a), few):
            x, y = (torch.tensor(side[start : start + few], device=memory.device) for side in (a, b))
            yield _swap_rows(squares, torch.cat([x, y]), torch.cat([y, x]))
    for strip in memory.split(g * rows):
        yield _rearranged(strip, (p, g, g), (1, 0, 2))


def _rearranged(strip: Tensor, shape: tuple[int, int, int], order: tuple[int, int, int]) -> Step:
    return Step(lambda: strip.view(shape).permute(order).flatten(), lambda values: strip.copy_(values))
