"""Errors for users: one line with the problem and the remedy."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dart_eval.util.text import printable

# Libraries' messages for exhausted memory; the last is of the loader of shared libraries.
NO_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "can't start new thread",
    "failed to map segment",
)  # fmt: skip


def short(text: str, most: int = 200) -> str:
    """Return a message without the middle of words, and of what stands in quotes, of more than `most` letters."""

    def cut(match: re.Match[str]) -> str:
        word = match.group()
        return word if len(word) <= most else f"{word[: most - 50]}...{word[-47:]}"

    return re.sub(r"(?<!\w)(['\"]).*?\1(?!\w)|\S+", cut, text)


class UserError(Exception):
    """Wrong input, printed as one line (problem; remedy); the command exits with status 2."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = (short(" ".join(printable(text).split())) for text in (problem, remedy))
        super().__init__(f"{self.problem}; {self.remedy}" if self.remedy else self.problem)


class Misfit(UserError):
    """A method that does not fit a model, or a sparsity that it cannot meet there: its cells are left out."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix the problem of every UserError in the block with its place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error.problem}", error.remedy) from None


class StoreError(UserError):
    """The results folder cannot be written, so no cell could be saved."""

    def __init__(self, folder: Path, error: OSError) -> None:
        full = "free disk space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        super().__init__(
            f"results cannot be written to {folder} ({error.strerror or error})",
            f"{full}choose another --output; finished cells remain",
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise StoreError for this folder if the block cannot write."""
    try:
        yield
    except OSError as error:
        raise StoreError(folder, error) from None


def remark(text: str) -> None:
    """Print a one-line note on stderr."""
    print(f"note: {' '.join(printable(text).split())}", file=sys.stderr)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the process has run out of memory."""
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or any(words in str(error).lower() for words in NO_MEMORY)


def summary(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(printable(str(error)).split())[:300]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean a, b?` for the known names closest to `name`, or the whole list where it is short."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, cutoff=0.65)  # less likeness misleads
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(known)}" if len(known) <= 20 else ""
