"""Matrices as codes of few bits: a weight is scale * code + offset, with a scale for neighbours in a row.

Weights that `--ffn-bits` rounds are such, and so are those of most quantised checkpoints. Of the latter the codes are
taken as they are stored, and scales and offsets are fitted to what the weights are: so one function serves all formats,
and codes that do not belong to the weights are noticed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dart_eval.bits import Rounding
from dart_eval.errors import UserError

CHUNK = 1 << 22  # weights at a time
NEAR = 2**-7  # of a group's largest weight, as far as one may lie from its grid: weights are kept in 16 bits


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

    def _over(self, values: Tensor) -> Tensor:
        group = self.rounding.group or self.codes.shape[1]
        return values.float().repeat_interleave(group, dim=1)[:, : self.codes.shape[1]]


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
