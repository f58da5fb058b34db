"""Files of an export: all paths are settled before the first write, and a failure leaves no files behind."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dart_eval.util.errors import UserError, remark
from dart_eval.util.files import check_name, write

T = TypeVar("T")
R = TypeVar("R")

NO_PLACE = "`--to lm-eval` has a place for every number"


class LeftOut(UserError):
    """A cell that the format has no place for."""


@dataclass(frozen=True)
class Piece:
    """Files that belong together: all of them are written, or none.

    Attributes:
        paths: the files that it can write, relative to the folder of the export.
        make: returns the text of each path; raises a UserError if the cell has to be left out.
    """

    paths: tuple[str, ...]
    make: Callable[[], dict[str, str]]


def write_pieces(folder: Path, pieces: Sequence[Piece], force: bool) -> list[Path]:
    """Write files piece by piece; a piece that fails is named on stderr and left out.

    Args:
        folder: the target; created if it is missing.
        pieces: the pieces to write.
        force: whether to replace existing files.

    Returns:
        The files.

    Raises:
        UserError: a file is there already, cannot be written, or no piece could be made. Files that this call wrote
            where none stood are taken away again.
    """
    check_name(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is no folder", "name a folder")
    there = [path for piece in pieces for path in piece.paths if os.path.lexists(folder / path)]
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{folder / there[0]}{more} would be replaced", "give --force, or another --output")
    old, stop = set(there), next((p for p in (folder, *folder.parents) if p.exists()), Path())
    made: list[Path] = []
    written: list[Path] = []  # where none stood
    try:
        for piece, texts in readable(pieces, lambda piece: piece.make()):
            for path, text in texts.items():
                _forget_half(folder / path)
                if path not in old:
                    written.append(folder / path)
                write(folder / path, text, "make room or choose another --output")
                made.append(folder / path)
            for path in old & set(piece.paths) - set(texts):
                (folder / path).unlink(missing_ok=True)  # of an earlier export of the same cell
    except BaseException:
        _take_away(written, stop)
        raise
    return sorted(made)


def readable(items: Sequence[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each item with what is read of it; name those that cannot be read.

    Raises:
        UserError: none can be read, or there is none.
    """
    failed: list[UserError] = []
    for item in items:
        try:
            found = read(item)
        except UserError as error:
            failed.append(error)
            continue
        yield item, found
    if len(failed) == len(items):
        raise failed[0] if failed else UserError("there is nothing to export", "give a folder with finished cells")
    for text in dict.fromkeys(str(error) for error in failed):
        remark(f"left out: {text}")


def _forget_half(path: Path) -> None:
    """Remove the partial files that a killed export left beside a file."""
    for left in path.parent.glob(f".{glob.escape(path.stem[:40])}.????????"):
        left.unlink(missing_ok=True)


def _take_away(written: Sequence[Path], stop: Path) -> None:
    """Remove written files, and the folders below `stop` that are empty without them."""
    for path in written:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            for above in path.parents:
                if above == stop:
                    break
                above.rmdir()
