"""dart-plus: each token reads more bits of the neurons that a preview leaves most open."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.images import Columns, FirstBits, Image, level_of
from dart_eval.pruning.choices.preview import Previewing
from dart_eval.pruning.masks.counts import Budget, Counts, ReadCost, check_most, exact_counts, too_much
from dart_eval.pruning.part import option
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class DartPlus(Previewing):
    """The neurons that a preview leaves most uncertain are read exactly; the next ones write their previewed value.

    Every token reads the first bits of gate and up, and so expects an h^2 of each neuron (`Preview.look`). Of some
    neurons it also reads the rest of their rows, and their columns of down. Of the next ones it reads the first bits of
    their columns alone, and their h is the preview's. A neuron is read exactly if

        (E[h^2] - preview^2 + known * preview^2) * norm^2

    is among the largest, with the norm of its column of down: the preview leaves E[h^2] - preview^2 open, and the first
    bits of down spoil the share `known` of the rest. Of the others, the largest E[h^2] * norm^2 write.

    If bytes are short, a preview also skips columns of gate and up, in tiles. It reads the tiles in which x has the
    largest norm in all of its bits (`fine`), and the next ones in one bit fewer (`rough`). Columns are sorted by their
    mean x^2 on the calibration text, so that tiles differ. This project's own.
    """

    name = "graded"
    summary = "reads all bits where the preview is least certain; the next neurons write their previewed values"
    adds = True
    fits_norms = False
    image: Image = option(FirstBits(), "what every token reads of gate and up before it chooses")  # type: ignore[misc]
    fine: float = option(
        0.0, "share of the columns that a preview reads in all of its bits; 0: set by the read", least=0, most=1
    )
    rough: float = option(
        0.0, "share of the columns beside the fine ones that a preview reads in one bit fewer", least=0, most=1
    )
    tile: int = option(64, "columns that are read or skipped together", least=1)
    known: float = option(
        0.2, "weight of the previewed h^2 beside its uncertainty, in the choice of exact neurons", least=0, most=1
    )
    coarse: float = option(
        1.0, "neurons that write their previewed values, as a multiple of the exact neurons", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rough and not isinstance(self.image, FirstBits):
            raise UserError(f"choice.rough is {self.rough:g}, and {self.image.title} has no fewer bits", "leave it out")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return 0 < self.fine < 1

    @property
    def fewer(self) -> int:  # type: ignore[override]
        return int(self.rough > 0 and 0 < self.fine < 1)

    def at(self, read: float) -> DartPlus:
        image, level = self.image, level_of(read)
        if not isinstance(image, FirstBits) or image.code:
            return self
        fine, rough = self.fine or level.columns.fine, self.rough if self.fine or self.rough else level.columns.rough
        return dataclasses.replace(self, image=image.at(level), fine=fine, rough=rough)

    def _tiles(self, width: int) -> tuple[int, int, int]:
        """Return the number of tiles: in all, read in all bits of a preview, and in one bit fewer."""
        tiles = -(-width // self.tile)
        fine = min(tiles, max(1, round((self.fine or 1) * tiles)))
        return tiles, fine, min(tiles - fine, round(self.rough * tiles))

    def columns(self, width: int) -> Columns:
        _, fine, rough = self._tiles(width)
        full = min(1.0, fine * self.tile / width)  # where the last tile is short, it may be a fine one or not
        return Columns(full, min(1.0 - full, rough * self.tile / width))

    def parts_of(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        import torch

        from dart_eval.kernels.top import largest

        tiles, fine, rough = self._tiles(x.shape[-1])
        if fine == tiles:
            return x, None
        squares = x.float().square() if order is None else x.float().square()[..., order]
        squares = torch.nn.functional.pad(squares, (0, -x.shape[-1] % self.tile)).unflatten(-1, (tiles, self.tile))
        sizes, every = squares.sum(-1), torch.ones(1, 1, tiles, dtype=torch.bool, device=x.device)
        first = largest(sizes, every, torch.full((len(x),), fine))
        both = largest(sizes, every, torch.full((len(x),), fine + rough))
        place = torch.arange(x.shape[-1], device=x.device) // self.tile
        if order is not None:
            place = torch.empty_like(place).index_copy_(0, order.to(x.device), place)
        return x * first[..., place], (x * (both & ~first)[..., place]) if rough else None

    def counts(self, budget: Budget) -> Counts:
        return graded_counts(budget, self.coarse, self.title)

    def cost_terms(self, read_cost: ReadCost) -> tuple[float, float, float, float]:
        assert read_cost.approximated is not None
        exact = read_cost.taken + read_cost.written - read_cost.approximated  # taken neurons are written too
        return read_cost.always, read_cost.in_mask, exact, read_cost.approximated

    def importance(self, token: Token) -> Tensor:
        assert token.expected is not None and token.columns is not None
        return token.expected * token.columns

    def choose(self, token: Token) -> Tensor:
        from dart_eval.kernels.top import largest

        assert token.expected is not None and token.columns is not None and token.preview is not None
        assert token.allowed is not None and token.taken is not None
        certain = (1 - self.known) * token.preview.float().square()
        return largest((token.expected - certain).clamp(min=0) * token.columns, token.allowed, token.taken)

    def approximated(self, token: Token, chosen: Tensor) -> Tensor:
        from dart_eval.kernels.top import largest

        assert token.allowed is not None and token.taken is not None and token.written is not None
        return largest(self.importance(token), token.allowed & ~chosen, token.written - token.taken)

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        # Previews of gate and up, the choice, and the image of down for at most all neurons.
        seen = sum(self.columns(shape.width)) * (shape.ffn_matrices - 1)
        return 2 * mask * shape.width * (seen + 1) + 19 * mask


def graded_counts(budget: Budget, ratio: float, title: str = "the choice") -> Counts:
    """Return the neurons per layer that are taken exactly, and that write exactly or by their previewed value.

    matrices * read = before * all + (taken + written) * taken neurons + approximated * other neurons that write. The
    budget is never exceeded, and missed by less than a neuron. What a layer cannot take, as it reads all of its codes,
    goes to the others.

    Args:
        ratio: neurons that write their previewed value, as a multiple of the taken ones.
        title: the choice in an error message.

    Returns:
        Counts; `written` includes the taken neurons.

    Raises:
        UserError: the image takes more than the sparsity leaves.
    """
    densities, sizes, sparsity, matrices, _, read_cost = budget
    assert read_cost is not None and read_cost.approximated is not None
    everything, rough = sum(sizes), read_cost.approximated
    before = read_cost.in_mask + read_cost.always  # of each neuron
    most = matrices * round((1.0 - sparsity) * everything) - before * everything
    if sparsity == 0:
        return Counts(list(sizes), list(sizes), list(sizes), read_cost.in_mask)
    if most < 0:
        raise too_much(title, before / matrices, sparsity)
    check_most(read_cost, matrices, sparsity, title)
    exact = read_cost.taken + read_cost.written

    def takes(room: float, n: int) -> float:
        """Return the neurons of n that can be taken. room: what they and the coarse ones may read."""
        few = room / (exact + ratio * rough)
        if few * (1 + ratio) <= n:
            return few
        return min(float(n), (room - rough * n) / (exact - rough)) if exact > rough else float(n)

    wanted = [takes(max(0.0, (matrices * d - before) * n), n) for d, n in zip(densities, sizes, strict=True)]
    clipped = any(w >= n for w, n in zip(wanted, sizes, strict=True))
    total = math.floor((takes(most, everything) if clipped else sum(wanted)) + 1e-9)
    taken = exact_counts(wanted, sizes, min(everything, total, math.floor(most / exact)))
    rest = most - exact * sum(taken)
    writing = [min(float(n), t + ratio * w) for n, t, w in zip(sizes, taken, wanted, strict=True)]
    more = [n - t for n, t in zip(sizes, taken, strict=True)]
    others = exact_counts(
        [w - t for w, t in zip(writing, taken, strict=True)], more, min(sum(more), math.floor(rest / rough))
    )
    return Counts(list(sizes), taken, [t + o for t, o in zip(taken, others, strict=True)], read_cost.in_mask)
