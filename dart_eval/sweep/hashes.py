"""A hash of the code that makes a cell's numbers. It changes with what code does, not with its layout.

It is taken over Python's tokens. Comments, docstrings, blank lines, the width of indentations and where a line inside
brackets breaks do not count. Nor do the names of files and folders, and the places from which code imports what is
this package's own. All else does: names, numbers, operators, texts (f-strings too), and what belongs to which block.
So does a trailing comma that a formatter adds, which changes a tuple elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

from dart_eval.util import source
from dart_eval.util.files import cache_dir, write_atomically
from dart_eval.util.source import sha256, source_hash, text_of

PACKAGE = Path(__file__).parents[1]
# Files and folders that `dart-eval run` executes and that affect numbers. Left out is what only passes data on (plan,
# jobs, files, journal, record), what refuses (errors, finite, checkpoint), and what finds or converts a model, whose
# weights have a hash of their own. A test holds this against what a run executes.
NUMERIC_CODE = (
    "layers", "weights", "pruning", "evaluation", "kernels/top.py", "util/bits.py", "models/adapters.py",
    "models/loading.py", "sweep/worker.py",
)  # fmt: skip
NO_NUMBER = (
    "layers/finite.py", "weights/checkpoint.py", "evaluation/task_hash.py", "evaluation/task_names.py",
    "evaluation/task_needs.py",
)  # fmt: skip
# Ways to decode faster with the same masks: `run` always multiplies by masks (`"execution": "masked"` in `plan.plan`).
NOT_RUN = ("pruning/session/kernels.py", "pruning/choices/previewed.py", "pruning/choices/graded.py")


@functools.cache  # a process runs the code that it has loaded, whatever becomes of the files
def code_hash(tasks: Path) -> str:
    """Return `hash_of` this package, computed once while no byte of it changes: a file of the user's cache has it.

    Args:
        tasks: the folder of the project's own tasks.
    """
    files = contents(PACKAGE, tasks)
    makers = [Path(file).read_bytes() for file in (__file__, source.__file__)]  # of a hash from these bytes
    key = sha256("\n".join([sys.version, *map(sha256, makers), *(k + sha256(c) for k, c in files)]).encode())
    place = cache_dir() / "code-hash"
    with contextlib.suppress(OSError, ValueError):
        known, found = place.read_text(encoding="ascii").split()
        if known == key:
            return found
    found = hash_of(files)
    with contextlib.suppress(OSError):
        write_atomically(place, f"{key} {found}")
    return found


def contents(package: Path, tasks: Path) -> list[tuple[str, bytes]]:
    """Return (ending, bytes) of each file of the numeric code.

    Args:
        package: the folder in which `NUMERIC_CODE` lies. tasks: the folder of tasks.
    """
    files = [*numeric_files(package), *sorted(f for f in tasks.rglob("*") if f.suffix in (".py", ".yaml"))]
    return [(f.suffix, f.read_bytes()) for f in files]


def hash_of(files: Iterable[tuple[str, bytes]]) -> str:
    """Return the sha256 over the tokens of Python files, and over the others as they are; their order is nothing to it.

    Args:
        files: see `contents`.
    """
    hashes = [source_hash(text_of(c)) if kind == ".py" else sha256(c) for kind, c in files]
    return sha256("\n".join(sorted(hashes)).encode())


def numeric_files(package: Path) -> list[Path]:
    """Return the files of `NUMERIC_CODE` that `run` executes, sorted.

    Args:
        package: the folder in which they lie.
    """
    found = {f for part in NUMERIC_CODE for f in [package / part, *(package / part).rglob("*.py")] if f.is_file()}
    return sorted(found - {package / name for name in (*NO_NUMBER, *NOT_RUN)})
