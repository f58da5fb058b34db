"""Files of an export: all paths are settled before the first write."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import check_name, write

LONGEST = 100  # bytes of a part of a path: file systems take 255, and endings are added
NO_PLACE = "`--to lm-eval` has a place for every number"


class LeftOut(UserError):
    """A cell that the format has no place for."""


@dataclass(frozen=True)
class Piece:
    """Files that belong together: all of them are written, or none.

    Attributes:
        make: returns the text of each path; raises a UserError if the cell has to be left out.
    """

    paths: tuple[str, ...]
    make: Callable[[], dict[str, str]]


def safe(text: str) -> str:
    """Return a text as one part of a path; a long one is cut and ends in a hash."""
    kept = re.sub(r"[^\w.@=+-]+", "_", text.replace("/", "__")).strip(".")
    if len(kept.encode()) > LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        kept = f"{kept.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"
    return kept or "_"


def write_pieces(folder: Path, pieces: Sequence[Piece], force: bool) -> list[Path]:
    """Write files piece by piece; a piece that fails is named on stderr and left out.

    Args:
        force: whether to replace existing files.

    Returns:
        The files.

    Raises:
        UserError: a file is there already, cannot be written, or no piece could be made.
    """
    check_name(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is no folder", "name a folder")
    there = [path for piece in pieces for path in piece.paths if os.path.lexists(folder / path)]
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{folder / there[0]}{more} would be replaced", "give --force, or another --output")
    old, written = set(there), set()
    for piece, texts in _texts_of(pieces):
        for path, text in texts.items():
            write(folder / path, text, "make room or choose another --output")
            written.add(path)
        for path in old & set(piece.paths) - set(texts):
            (folder / path).unlink(missing_ok=True)  # of an earlier export of the same cell
    return sorted(folder / path for path in old | written if os.path.lexists(folder / path))


def _texts_of(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, dict[str, str]]]:
    failed: list[UserError] = []
    for piece in pieces:
        try:
            texts = piece.make()
        except UserError as error:
            failed.append(error)
            continue
        yield piece, texts
    if len(failed) == len(pieces):
        raise failed[0] if failed else UserError("there is nothing to export", "give a folder with finished cells")
    for text in dict.fromkeys(str(error) for error in failed):
        remark(f"left out: {text}")
