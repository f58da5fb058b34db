"""The sha256 of a model's folder. As it takes seconds, it may begin in a thread while the libraries are imported."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from dart_eval.models import demo_model
from dart_eval.util.errors import UserError, out_of_memory
from dart_eval.util.files import feed, reason

WEIGHTS = (".safetensors", ".bin")
HASHED = (".json", ".jinja", ".model", ".txt", ".tiktoken", *WEIGHTS, ".py")  # weights, configuration, tokenizer
_BEGUN: dict[Path, Future[str]] = {}


def begin(name: str | None) -> None:
    """Begin to hash a model that lies in a folder, for the next `of_folder`. A process that ends does not wait for it.

    Args:
        name: as in `ModelSpec`.
    """
    folder = demo_model.place() if name in (None, demo_model.ALIAS) else Path(os.path.expanduser(name))
    with contextlib.suppress(OSError):  # `resolve` names it
        if (folder / "config.json").is_file():
            _BEGUN[folder] = Future()
            threading.Thread(target=_fulfil, args=(_BEGUN[folder], folder), daemon=True).start()


def _fulfil(future: Future[str], folder: Path) -> None:
    try:
        future.set_result(_hashed(folder))
    except Exception as error:  # of the file system: raised where the hash is asked for
        future.set_exception(error)


def of_folder(path: Path) -> str:
    """Return the sha256 of a folder's weights, configuration, tokenizer and code."""
    begun = _BEGUN.pop(path, None)
    return _hashed(path) if begun is None else begun.result()


def of_tokenizer(path: Path) -> str:
    """Return the sha256 of a folder without its weights."""
    with readable(f"tokenizer {path}"):
        return _hashed(path, tuple(set(HASHED) - set(WEIGHTS)))


def _hashed(path: Path, endings: Sequence[str] = HASHED) -> str:
    digest = hashlib.sha256()
    files = {f for f in path.iterdir() if f.suffix in endings} | set(path.rglob("*.py"))
    for file in sorted(f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        feed(digest, file)
    return digest.hexdigest()


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
