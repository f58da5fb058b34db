"""The sha256 of a model's folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.util.files import feed, reason

WEIGHTS = (".safetensors", ".bin")
HASHED = (".json", ".jinja", ".model", ".txt", ".tiktoken", *WEIGHTS, ".py")  # weights, configuration, tokenizer


def of_folder(path: Path, endings: Sequence[str] = HASHED) -> str:
    """Return the sha256 of a folder's weights, configuration, tokenizer and code."""
    digest = hashlib.sha256()
    files = {f for f in path.iterdir() if f.suffix in endings} | set(path.rglob("*.py"))
    for file in sorted(f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        feed(digest, file)
    return digest.hexdigest()


def of_tokenizer(path: Path) -> str:
    """Return the sha256 of a folder without its weights."""
    with readable(f"tokenizer {path}"):
        return of_folder(path, tuple(set(HASHED) - set(WEIGHTS)))


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Name what is read in errors of the file system: `model NAME`.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        yield
    except OSError as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{what} cannot be read ({reason(error)})", "check the permissions of its files") from None
