"""What a user is told: a single line that says what is wrong and what to do."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dart_eval.util.text import printable

# How libraries say that there is no more memory; the last is the loader's of shared ones.
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to map segment")


LIKE = 0.65  # below this likeness a suggestion misleads


class UserError(Exception):
    """The input is wrong. Printed as one line (problem; remedy); the command exits with status 2."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = " ".join(printable(problem).split())
        self.remedy = " ".join(printable(remedy).split())
        super().__init__(f"{self.problem}; {self.remedy}" if self.remedy else self.problem)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put where it is wrong before what is wrong, in every error of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error.problem}", error.remedy) from None


class StoreError(UserError):
    """The results folder cannot be written: no cell could be kept."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"results cannot be written to {folder} ({error.strerror or error})",
            "make room or choose another --output; what is finished is kept",
        )


def remark(text: str) -> None:
    """Say something beside the results: one line on stderr."""
    print(f"note: {' '.join(printable(text).split())}", file=sys.stderr)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the process, has no more memory."""
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in text for words in NO_MEMORY)


def summary(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(printable(str(error)).split())[:300]}"


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """`did you mean a, b?` for the known names closest to `name`, or the whole list where it is short."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=LIKE)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(known)}" if len(known) <= 20 else ""
