"""Dense's last hidden states at the scored positions, kept once for all rows: its distributions follow by the head.

A state is named by the tokens before it, so that whatever comes there finds it. It is [D] numbers of the model's dtype,
some hundred times fewer than logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

NAME = 16  # bytes


class States:
    """States by name, in memory.

    Args:
        room: bytes that they may take; beyond, none is kept.
        tensors: those of `tensors()`, to look up; None: states are to be gathered.

    Attributes:
        gathering: whether states are still to come.
        full: whether there was no room for all of them.
        known: whether rows can be compared with them.
    """

    def __init__(self, room: int, tensors: Sequence[Tensor] | None = None) -> None:
        self.gathering, self.known = tensors is None, bool(tensors)
        self.full = not (self.gathering or self.known)
        self._parts: list[Tensor] = []
        self._rows: dict[bytes, int] = {}
        self.room, self._bytes = room, 0
        if tensors:
            names, states = tensors
            self._parts, flat = [states], names.numpy().tobytes()
            self._rows = {flat[at : at + NAME]: at // NAME for at in range(0, len(flat), NAME)}

    def keep(self, names: Sequence[bytes], states: Tensor) -> None:
        """Keep states [n, D] under their names; the first of a name stays."""
        new = {name: row for row, name in reversed([*enumerate(names)]) if name not in self._rows}
        if not new or self.full:
            return
        self._rows |= {name: len(self._rows) + i for i, name in enumerate(new)}
        self._parts.append(states[list(new.values())].cpu())
        self._bytes += self._parts[-1].nbytes
        if self._bytes > self.room:
            self.full = True
            self._parts.clear()
            self._rows.clear()

    def find(self, names: Sequence[bytes]) -> Tensor:
        """Return the states [n, D] of these names, on the CPU.

        Raises:
            KeyError: dense has not been there.
        """
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0][[self._rows[name] for name in names]]

    def tensors(self) -> list[Tensor]:
        """Return names [N, NAME] uint8 and states [N, D]; nothing if there was no room, or nothing to keep."""
        if not self._parts:
            return []
        names = torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.uint8).view(-1, NAME)
        return [names, torch.cat(self._parts)]


def begin_name(context: Sequence[int], angles: int) -> hashlib.blake2b:
    """Return the name of the state after a context, as a hash to which further tokens are fed.

    Args:
        angles: of the positions, see `rotary.Angles`.
    """
    return hashlib.blake2b(torch.tensor([angles, *context]).numpy().tobytes(), digest_size=NAME)


def with_token(name: hashlib.blake2b, token: int) -> hashlib.blake2b:
    """Return the name after one token more."""
    longer = name.copy()
    longer.update(token.to_bytes(8, "little"))
    return longer
