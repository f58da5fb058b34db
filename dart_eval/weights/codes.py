"""Matrices as low-bit codes: a weight is scale * code + offset, and neighbours in a row share a scale.

Weights rounded by `--ffn-bits` have this form, and so do those of most quantised checkpoints. Their codes are read from
the files, and scales and offsets are fitted to the weights. So one function serves all formats, and codes that do not
belong to the weights are noticed.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError

CHUNK = 1 << 22  # weights at a time
PART = 1 << 18  # weights that are decoded at a time, so that they stay in a core's cache
LINE = 4  # first bits, from which on a line stands for them
NEAR = 2**-7  # most distance from the grid, of a group's largest weight, as weights have 16 bits


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as codes and scales.

    Attributes:
        codes: [out, in] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scales: [out, groups] fp16 or fp32; a scale may be negative.
        rounding: the bits of a code, and the weights that share a scale.
        offsets: [out, groups] fp32, the value of code 0; None: 0.
        groups: [in], the group of each column, if a group is not made of neighbours; None.
    """

    codes: Tensor
    scales: Tensor
    rounding: Rounding
    offsets: Tensor | None = None
    groups: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "codes" and self.moved:
            return self._made()
        raise AttributeError(name)

    @property
    def moved(self) -> bool:
        """Whether others hold the codes (`move`)."""
        return "_made" in self.__dict__

    def move(self, made: Callable[[], Tensor]) -> None:
        """Free the codes: others hold them, and make them anew at each use.

        Args:
            made: returns `codes`.
        """
        object.__setattr__(self, "_shape", self.shape)
        object.__setattr__(self, "_made", made)
        self.__dict__.pop("codes", None)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        found: torch.Size = self._shape if self.moved else self.codes.shape
        return found

    @property
    def values(self) -> Tensor:
        """[out, in] fp32, the values of the codes."""
        return self.decoded(torch.float32)

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype, first: int | None = None, whole: bool = False) -> Tensor:
        """Return [out, in], the values of the codes or of their first bits.

        Four first bits and more stand for a line (`line`), fewer for the mean of the matrix's codes that begin so. In a
        trial of 160 tokens of four texts dart-plus was as near to dense with either at 30 % of the bytes (KL .023), and
        at 22 % nearer with the mean (.107 and .113, a difference of .006 +- .004).

        Args:
            first: bits of each code that are read; None: all.
            whole: means are rounded to whole codes, which a kernel multiplies.
        """
        low = 0 if first is None else max(0, self.rounding.bits - first)
        means = self.means(low, whole) if low else None
        every, (rows, width) = self.codes, self.shape
        out = every.new_empty(every.shape, dtype=dtype)
        group = self._together
        for start in range(0, rows, some := max(1, PART // width)):
            part = slice(start, start + some)
            codes = every[part]
            values = (
                codes.float() if means is None else means.index_select(0, self._begin(codes, low)).view(codes.shape)
            )
            groups = values.view(len(codes), -1, group)
            groups *= self._each(self.scales[part], group)
            if self.offsets is not None:
                groups += self._each(self.offsets[part], group)
            out[part] = values
        return out

    def _begin(self, codes: Tensor, low: int) -> Tensor:
        """Return [n] int32, the first bits of codes, counted from 0. low: last bits that are not read."""
        return (codes.flatten().int() + 2 ** (self.rounding.bits - 1)) >> low

    @functools.cached_property
    def _mean_codes(self) -> dict[int, Tensor]:
        return {}

    def means(self, low: int, whole: bool = False) -> Tensor:
        """Return fp32 what each value of first bits stands for (`decoded`), cached. low: as of `_begin`."""
        if low not in self._mean_codes:
            self._mean_codes[low] = self._mean_code(low)
        found = self._mean_codes[low]
        return found.round() if whole and self.rounding.bits - low < LINE else found

    def _mean_code(self, low: int) -> Tensor:
        if self.scales.is_meta:  # a shape alone
            return self.scales.new_empty(2**self.rounding.bits >> low, dtype=torch.float32)
        if self.rounding.bits - low >= LINE:
            slope, middle = self.line(low)
            first = torch.arange(2**self.rounding.bits >> low, dtype=torch.float64, device=self.scales.device)
            return (slope * first + middle).float()
        code, number = self._histogram()
        begin = self._begin(code, low).long()
        sums, count = torch.zeros(2, int(begin[-1]) + 1, dtype=torch.float64, device=code.device)
        sums.index_add_(0, begin, number * code)
        return (sums / count.index_add_(0, begin, number).clamp_min(1)).float()  # 0 where no code begins so

    def line(self, low: int) -> tuple[float, float]:
        """Return slope and offset of the codes over their first bits, by least squares over all of the matrix.

        A kernel multiplies such a line in whole numbers, and adds the last bits to it (`kernels.cpu`).

        Args:
            low: last bits that are not read. First bits count from 0.
        """
        code, number = self._histogram()
        first, share = self._begin(code, low).double(), number / number.sum()
        away = first - share @ first
        spread = float(share @ away.square())
        slope = float(share @ (away * code)) / spread if spread else 2.0**low
        return slope, float(share @ (code - slope * first))

    def _histogram(self) -> tuple[Tensor, Tensor]:
        """Return all possible codes, ascending, and how often the matrix has each, [2^bits] fp64."""
        half = 2 ** (self.rounding.bits - 1)
        number = torch.zeros(2 * half, dtype=torch.float64, device=self.scales.device)
        for some in self.codes.split(max(1, CHUNK // self.shape[1])):
            number += torch.bincount(some.flatten().int() + half, minlength=2 * half)
        return torch.arange(-half, half, device=self.scales.device), number

    @property
    def _together(self) -> int:
        """Neighbours that are in one group throughout a row; 1 if scales must be expanded first."""
        width = self.shape[1]
        group = min(self.rounding.group or width, width)
        return group if self.groups is None and width % group == 0 else 1

    def _each(self, shared: Tensor, group: int) -> Tensor:
        """Expand a value per group, [n, groups], to [n, groups, 1] fp32, or with groups of 1 to [n, in, 1]."""
        if self.groups is not None:
            shared = shared[:, self.groups]
        elif group == 1:
            shared = shared.repeat_interleave(self.rounding.group or 1, dim=1)[:, : self.shape[1]]
        return shared.float()[..., None]

    def chunk(self, parts: int) -> list[Packed]:
        """Split into the matrices that are stacked in this one."""
        if parts == 1:
            return [self]
        offsets = [None] * parts if self.offsets is None else self.offsets.chunk(parts)
        pieces = zip(self.codes.chunk(parts), self.scales.chunk(parts), offsets, strict=True)
        return [Packed(codes, scales, self.rounding, offset, self.groups) for codes, scales, offset in pieces]


@torch.no_grad()
def fitted(codes: Tensor, values: Tensor, rounding: Rounding, unsigned: bool = False) -> Packed | None:
    """Fit the scale and offset of each group of codes to the weights, by least squares.

    Args:
        codes: [out, in] whole numbers, as the format counts them.
        values: [out, in], the weights.
        unsigned: codes begin at 0, not at -2^(bits - 1).

    Returns:
        None if the weights are not on the grid of the codes, or the codes have more bits.
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
        fit = _fit(_groups(held.float(), group), _groups(wanted.float(), group))
        if fit is None:
            return None
        scales.append(fit[0])
        offsets.append(fit[1])
    return Packed(codes.to(torch.int8), torch.cat(scales), rounding, torch.cat(offsets))


def _groups(rows: Tensor, group: int) -> Tensor:
    """Return [R, G, group]; the last group is padded with its own first entry."""
    lacking = -rows.shape[1] % group
    if lacking:
        first = rows[:, rows.shape[1] - (group - lacking), None]
        rows = torch.cat([rows, first.expand(-1, lacking)], 1)
    return rows.unflatten(1, (-1, group))


def _fit(codes: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return scales and offsets, [R, G] each; None if a weight is off the grid. Arguments: [R, G, group] fp32."""
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
    """Note how to find the codes of a projection; nothing is read before they are needed.

    Args:
        find: called with the projection. It must not hold a reference to it, or no model would ever be freed.
    """
    _NOTED[linear] = find


def expected(linear: nn.Module) -> bool:
    """Whether a projection, perhaps without weights yet, has a noted source of codes."""
    return linear in _NOTED


@torch.no_grad()
def noted(linear: nn.Module) -> Packed | None:
    """Return the codes of a projection's checkpoint; None if there are none that belong to its weights.

    They are searched on the first call, and again if the weights have changed or moved.
    """
    if linear not in _NOTED:
        return None
    held = list(itertools.chain(linear.parameters(), linear.buffers()))
    if any(t.is_meta for t in held):  # an outline: codes belong to no weights yet
        return None
    state = tuple((t.device, t.data_ptr() if t.layout == torch.strided and type(t) is nn.Parameter else 0, t._version)
                  for t in held)  # fmt: skip
    if linear not in _FOUND or _FOUND[linear][0] != state:
        try:
            _FOUND[linear] = state, _NOTED[linear](linear)
        except (UserError, OSError, KeyError, RuntimeError, ValueError, SafetensorError):  # an odd file has no codes
            _FOUND[linear] = state, None
    return _FOUND[linear][1]
