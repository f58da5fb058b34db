"""A hash of the code that makes a cell's numbers. It changes with what code does, not with its layout.

It is taken over Python's tokens. Comments, docstrings, blank lines, the width of indentations and where a line inside
brackets breaks do not count. Nor do the names of files and folders, and the places from which code imports what is
this package's own. All else does: names, numbers, operators, texts (f-strings too), and what belongs to which block.
So does a trailing comma that a formatter adds, which changes a tuple elsewhere.
"""

from __future__ import annotations

import functools
from pathlib import Path

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
    """Return `hash_of` this package, computed once a process.

    Args:
        tasks: the folder of the project's own tasks.
    """
    return hash_of(PACKAGE, tasks)


def hash_of(package: Path, tasks: Path) -> str:
    """Return the sha256 over the tokens of the numeric code. Moving or renaming a file does not change it.

    Args:
        package: the folder in which `NUMERIC_CODE` lies.
        tasks: the folder of tasks. Their YAML files count as they are.
    """
    files = [*numeric_files(package), *(f for f in tasks.rglob("*") if f.suffix in (".py", ".yaml"))]
    contents = [source_hash(text_of(f)) if f.suffix == ".py" else sha256(f.read_bytes()) for f in files]
    return sha256("\n".join(sorted(contents)).encode())


def numeric_files(package: Path) -> list[Path]:
    """Return the files of `NUMERIC_CODE` that `run` executes, sorted.

    Args:
        package: the folder in which they lie.
    """
    found = {f for part in NUMERIC_CODE for f in [package / part, *(package / part).rglob("*.py")] if f.is_file()}
    return sorted(found - {package / name for name in (*NO_NUMBER, *NOT_RUN)})
