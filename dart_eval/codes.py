"""Matrices as codes of few bits: a weight is scale * code + offset, with a scale for neighbours in a row.

Weights that `--ffn-bits` rounds are such, and so are those of most quantised checkpoints. Of the latter the codes are
found again from what the weights are: by their scales where these are at hand, else by the steps between neighbours.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dart_eval.bits import Rounding

CHUNK = 1 << 22  # weights at a time
# As far as a weight in fp32 may lie from its grid, in steps: less than by what distances of 250 and 251 differ.
NEAR = 0.002
NEAR_16_BITS = 0.3  # the same of weights that were rounded to 16 bits


@dataclass(frozen=True)
class Packed:
    """A matrix as codes and scales.

    Attributes:
        codes: [out, in] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scales: [out, groups] fp16 or fp32; that of a group may be negative.
        rounding: the bits of a code, and the weights that share a scale.
        offsets: [out, groups] fp32, what the code 0 stands for; None: 0.
    """

    codes: Tensor
    scales: Tensor
    rounding: Rounding
    offsets: Tensor | None = None

    @property
    def bits(self) -> float:
        """Of a weight, with its part of a scale."""
        return self.rounding.weight_bits(self.codes.shape[1])

    @property
    def spread(self) -> Tensor:
        """[out, in] fp32, the scale of each weight."""
        return self._over(self.scales)

    @property
    def values(self) -> Tensor:
        """[out, in] fp32, what the codes stand for."""
        return self.standing(self.codes)

    def standing(self, codes: Tensor) -> Tensor:
        """[out, in] fp32, what other codes of this matrix would stand for. codes: [out, in], perhaps fractions."""
        found = self.spread * codes
        return found if self.offsets is None else found + self._over(self.offsets)

    def chunk(self, parts: int) -> list[Packed]:
        """The matrices that lie below each other in this one."""
        offsets = [None] * parts if self.offsets is None else self.offsets.chunk(parts)
        pieces = zip(self.codes.chunk(parts), self.scales.chunk(parts), offsets, strict=True)
        return [Packed(codes, scales, self.rounding, offset) for codes, scales, offset in pieces]

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Packed(self.codes.to(device), self.scales.to(device), self.rounding, offsets)

    def _over(self, values: Tensor) -> Tensor:
        group = self.rounding.group or self.codes.shape[1]
        return values.float().repeat_interleave(group, dim=1)[:, : self.codes.shape[1]]


def on_grid(values: Tensor, scales: Tensor, rounding: Rounding, near: float = NEAR_16_BITS) -> Packed | None:
    """The codes of a matrix whose scales are known.

    A group whose codes do not fit around 0 begins with the smallest one; so all codes fit, and nothing is lost.

    Args:
        values: [out, in]. scales: [out, groups]. near: as far as a weight may lie from its grid, in steps.

    Returns:
        None where some weight lies on no such grid.
    """
    parts = []
    for rows, step in _pieces(values, rounding, scales):
        found = rows / torch.where(step == 0, 1, step)
        if not _fits(found, near):
            return None
        parts.append((found.round(), step, torch.zeros_like(step)))
    return _made(parts, values.shape[1], rounding)


def recovered(values: Tensor, rounding: Rounding) -> Packed | None:
    """The codes of a matrix of which only the weights are at hand, in fp32: every group on a grid of its own.

    The step of a group is the smallest distance of two neighbours in size, or a whole part of it: all distances are
    multiples of it.

    Args:
        values: [out, in] fp32.

    Returns:
        None where some group lies on no grid of so many bits.
    """
    parts = []
    for rows, _ in _pieces(values, rounding, None):
        step = _step(rows, 2**rounding.bits)
        if step is None:
            return None
        low = rows.amin(-1, keepdim=True)
        span = rows.amax(-1, keepdim=True) - low
        safe = torch.where(step == 0, 1, span / (span / step).round())  # of the longest distance, so as to be exact
        first = low / safe
        whole = ((first - first.round()).abs() < NEAR) & (step != 0)  # 0 lies on the grid
        first = torch.where(whole, first.round(), 0)
        parts.append((((rows - low) / safe).round() + first, safe * (step != 0), torch.where(whole, 0, low)))
    return _made(parts, values.shape[1], rounding)


def _step(rows: Tensor, most: int) -> Tensor | None:
    """[R, G, 1], the step of each group; 0: all its weights are equal; None: some group has none.

    Args:
        rows: [R, G, group]. most: steps that may lie between the two nearest weights of a group.
    """
    groups = rows.flatten(0, 1)
    gaps = groups.sort(-1).values.diff(dim=-1)
    gaps = gaps.masked_fill_(gaps <= 1e-6 * groups.abs().amax(-1, keepdim=True), 0)
    least = gaps.masked_fill(gaps == 0, torch.inf).amin(-1)
    step = torch.zeros_like(least)
    open_ = (~least.isinf()).nonzero().squeeze(1)
    for parts in range(1, most):
        multiple = gaps[open_] * (parts / least[open_, None])
        fits = ((multiple - multiple.round()).abs() < NEAR).all(-1)
        step[open_[fits]] = least[open_[fits]] / parts
        open_ = open_[~fits]
    return None if len(open_) else step.view(*rows.shape[:2], 1)


def _pieces(values: Tensor, rounding: Rounding, scales: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: [R, G, group] fp32, the last group filled up with its first weight; [R, G, 1], scales."""
    width = values.shape[1]
    group = min(rounding.group, width) or width
    some = max(1, CHUNK // width)
    for start in range(0, len(values), some):
        rows = values[start : start + some].float()
        if lacking := -width % group:
            rows = torch.cat([rows, rows[:, -(group - lacking)].unsqueeze(1).expand(-1, lacking)], 1)
        steps = rows[:, :0] if scales is None else scales[start : start + some].float()[..., None]
        yield rows.unflatten(1, (-1, group)), steps


def _fits(found: Tensor, near: float) -> bool:
    return bool(((found - found.round()).abs() <= near).all())


def _made(parts: list[tuple[Tensor, Tensor, Tensor]], width: int, rounding: Rounding) -> Packed | None:
    """Of pieces: codes on a grid that goes on without end, [R, G, group]; steps and what the code 0 is, [R, G, 1]."""
    codes, scales, offsets = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    half = 2 ** (rounding.bits - 1)
    low, high = codes.amin(-1, keepdim=True), codes.amax(-1, keepdim=True)
    if bool((high - low >= 2 * half).any()):
        return None
    at_zero = offsets == 0
    turned = at_zero & (high == half) & (low > -half)  # a scale may be negative, so that its largest weight fits
    sign = 1 - 2 * turned.to(codes.dtype)
    codes, scales = codes * sign, scales * sign
    first = torch.where(turned | at_zero & (low >= -half) & (high < half), 0, low + half)
    codes = (codes - first).to(torch.int8).flatten(1)[:, :width].contiguous()
    offsets = (offsets + first * scales).squeeze(-1).float()
    return Packed(codes, scales.squeeze(-1).float(), rounding, offsets if bool(offsets.any()) else None)


# -- of a checkpoint -------------------------------------------------------------------------------------------------

_NOTED: weakref.WeakKeyDictionary[nn.Module, Callable[[], Packed | None]] = weakref.WeakKeyDictionary()
_FOUND: weakref.WeakKeyDictionary[nn.Module, Packed | None] = weakref.WeakKeyDictionary()


def note(linear: nn.Module, find: Callable[[], Packed | None]) -> None:
    """Keep how the codes of a projection can be found; nothing is done before they are asked for."""
    _NOTED[linear] = find


@torch.no_grad()
def noted(linear: nn.Module) -> Packed | None:
    """The codes of a projection's checkpoint, found when they are first asked for; None where there are none."""
    if linear not in _NOTED:
        return None
    if linear not in _FOUND:
        found = _NOTED[linear]()
        device = next(itertools.chain(linear.parameters(), linear.buffers())).device  # it may have moved since
        _FOUND[linear] = None if found is None else found.to(device)
    return _FOUND[linear]
