"""Matrices as codes of few bits: a weight is scale * code + offset, with a scale for neighbours in a row.

Weights that `--ffn-bits` rounds are such, and so are those of most quantised checkpoints. Of the latter the codes are
taken as they are stored, and scales and offsets are fitted to what the weights are: so one function serves all formats,
and codes that do not belong to the weights are noticed.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError

CHUNK = 1 << 22  # weights at a time
PART = 1 << 18  # weights that are decoded at a time: so many stay in a core's cache
NEAR = 2**-7  # of a group's largest weight, as far as one may lie from its grid: weights are kept in 16 bits


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as codes and scales.

    Attributes:
        codes: [out, in] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scales: [out, groups] fp16 or fp32; that of a group may be negative.
        rounding: the bits of a code, and the weights that share a scale.
        offsets: [out, groups] fp32, what the code 0 stands for; None: 0.
        groups: [in], the group of each column, where neighbours are in others; None.
    """

    codes: Tensor
    scales: Tensor
    rounding: Rounding
    offsets: Tensor | None = None
    groups: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """[out, in] fp32, what the codes stand for."""
        return self.decoded(torch.float32)

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype, first: int | None = None) -> Tensor:
        """[out, in], what the codes stand for, or their first bits alone.

        First bits leave some codes open, and stand for the mean of the matrix's codes that begin so.

        Args:
            first: bits of each code that are read; None: all.
        """
        low = 0 if first is None else max(0, self.rounding.bits - first)
        means = self._means(low) if low else None
        (rows, width), made = self.codes.shape, self.codes.new_empty(self.codes.shape, dtype=dtype)
        group = self._together
        for start in range(0, rows, some := max(1, PART // width)):
            part = slice(start, start + some)
            codes = self.codes[part]
            values = (
                codes.float() if means is None else means.index_select(0, self._begin(codes, low)).view(codes.shape)
            )
            groups = values.view(len(codes), -1, group)
            groups *= self._each(self.scales[part], group)
            if self.offsets is not None:
                groups += self._each(self.offsets[part], group)
            made[part] = values
        return made

    @functools.cached_property
    def _known(self) -> dict[int, Tensor]:
        return {}

    def _begin(self, codes: Tensor, low: int) -> Tensor:
        """[n] int32, the first bits of codes, counted from 0. low: last bits that are not read."""
        return ((codes >> low).flatten().int()) + (2 ** (self.rounding.bits - 1) >> low)

    def _means(self, low: int) -> Tensor:
        """fp32, the mean code of each value of first bits; 0 of those that do not come up. low: as of `_begin`."""
        if low not in self._known:
            count = 2**self.rounding.bits >> low
            sums, number = torch.zeros(2, count, dtype=torch.float64, device=self.codes.device)
            for some in self.codes.split(max(1, CHUNK // self.codes.shape[1])):
                begin = self._begin(some, low)
                sums.index_add_(0, begin, some.flatten().double())
                number += torch.bincount(begin, minlength=count)
            self._known[low] = (sums / number.clamp_min(1)).float()
        return self._known[low]

    @property
    def _together(self) -> int:
        """Neighbours that are in one group throughout a row; 1 where scales must be spread out first."""
        width = self.codes.shape[1]
        group = min(self.rounding.group or width, width)
        return group if self.groups is None and width % group == 0 else 1

    def _each(self, shared: Tensor, group: int) -> Tensor:
        """[n, groups, 1] fp32 of what groups share, [n, groups]; a group of 1 has the number of its own weight."""
        if self.groups is not None:
            shared = shared[:, self.groups]
        elif group == 1:
            shared = shared.repeat_interleave(self.rounding.group or 1, dim=1)[:, : self.codes.shape[1]]
        return shared.float()[..., None]

    def chunk(self, parts: int) -> list[Packed]:
        """The matrices that lie below each other in this one."""
        offsets = [None] * parts if self.offsets is None else self.offsets.chunk(parts)
        pieces = zip(self.codes.chunk(parts), self.scales.chunk(parts), offsets, strict=True)
        return [Packed(codes, scales, self.rounding, offset, self.groups) for codes, scales, offset in pieces]


@torch.no_grad()
def fitted(codes: Tensor, values: Tensor, rounding: Rounding, unsigned: bool = False) -> Packed | None:
    """Codes with the scale and the offset of each group that fit the weights best, by least squares.

    Args:
        codes: [out, in] whole numbers, as the format counts them. values: [out, in], the weights.
        unsigned: codes begin at 0, not at -2^(bits - 1).

    Returns:
        None where the weights are no such multiples of the codes, or the codes have more bits.
    """
    half = 2 ** (rounding.bits - 1)
    codes = codes.to(values.device, torch.int16) - (half if unsigned else 0)
    if codes.shape != values.shape or int(codes.min()) < -half or int(codes.max()) >= half:
        return None
    width = codes.shape[1]
    group = min(rounding.group, width) or width
    some = max(1, CHUNK // width)
    scales, offsets = [], []
    for held, wanted in zip(codes.split(some), values.split(some), strict=True):
        found = _fit(_groups(held.float(), group), _groups(wanted.float(), group))
        if found is None:
            return None
        scales.append(found[0])
        offsets.append(found[1])
    return Packed(codes.to(torch.int8), torch.cat(scales), rounding, torch.cat(offsets))


def _groups(rows: Tensor, group: int) -> Tensor:
    """[R, G, group], the last one filled up with its own first entry."""
    lacking = -rows.shape[1] % group
    if lacking:
        first = rows[:, rows.shape[1] - (group - lacking), None]
        rows = torch.cat([rows, first.expand(-1, lacking)], 1)
    return rows.unflatten(1, (-1, group))


def _fit(codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """[R, G] each, scales and offsets; None where some weight lies off its grid. Both: [R, G, group] fp32."""
    mean, middle = codes.mean(-1, keepdim=True), values.mean(-1, keepdim=True)
    spread = (codes - mean).square().sum(-1, keepdim=True)
    scale = ((codes - mean) * (values - middle)).sum(-1, keepdim=True) / spread.clamp_min(1e-9)
    offset = middle - scale * mean
    off = (values - scale * codes - offset).abs().amax(-1)
    if bool((off > NEAR * values.abs().amax(-1)).any()):
        return None
    return scale.squeeze(-1), offset.squeeze(-1)


# -- of a checkpoint -------------------------------------------------------------------------------------------------

_NOTED: weakref.WeakKeyDictionary[nn.Module, Callable[[nn.Module], Packed | None]] = weakref.WeakKeyDictionary()
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[object, Packed | None]] = weakref.WeakKeyDictionary()


def note(linear: nn.Module, find: Callable[[nn.Module], Packed | None]) -> None:
    """Keep how the codes of a projection can be found; nothing is done before they are asked for.

    Args:
        find: given the projection, which it must not hold itself: then no model would ever be freed.
    """
    _NOTED[linear] = find


def expected(linear: nn.Module) -> bool:
    """Whether it was noted how the codes of a projection are found, which may have no weights yet."""
    return linear in _NOTED


@torch.no_grad()
def noted(linear: nn.Module) -> Packed | None:
    """The codes of a projection's checkpoint; None where there are none that belong to its weights.

    They are looked for when they are first asked for, and again where the weights have changed or moved.
    """
    if linear not in _NOTED:
        return None
    held = list(itertools.chain(linear.parameters(), linear.buffers()))
    state = tuple((t.device, t.data_ptr() if t.layout == torch.strided and type(t) is nn.Parameter else 0, t._version)
                  for t in held)  # fmt: skip
    if linear not in _FOUND or _FOUND[linear][0] != state:
        try:
            _FOUND[linear] = state, _NOTED[linear](linear)
        except (UserError, OSError, KeyError, RuntimeError, ValueError, SafetensorError):  # an odd file has no codes
            _FOUND[linear] = state, None
    return _FOUND[linear][1]
