"""Files, read and written in the same way by every verb.

A regular file is old or new, never half. A symbolic link's target is written, and the link stays; a pipe or a device is
written into, and never replaced. All text is UTF-8, whatever the locale.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dart_eval.util.errors import UserError

HEAD, MARK = 1 << 12, b"dart-eval"  # bytes in which a file of ours names its maker, if its form has a place for that
LONGEST = 100  # bytes of a part of a path: file systems take 255, and endings are added


def cache_dir() -> Path:
    """`$DART_EVAL_CACHE`, else `$XDG_CACHE_HOME/dart-eval`, else `~/.cache/dart-eval`."""
    if own := os.environ.get("DART_EVAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dart-eval"


def feed(digest: hashlib._Hash, file: Path) -> None:
    """Feed the bytes of a file to a digest of hashlib, a part at a time."""
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)


@contextlib.contextmanager
def telling(problem: str, remedy: str) -> Iterator[None]:
    """Turn what the system says of a path in the block into one line. BrokenPipeError passes: nobody reads any more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{problem} ({reason(error)})", remedy) from None


def write(path: str | Path, data: str | bytes, remedy: str = "choose another file") -> None:
    """Write a file that the user named.

    Raises:
        UserError: it cannot be written. BrokenPipeError: nobody reads the pipe any more.
    """
    content = _bytes(data)
    with telling(f"{path} cannot be written", remedy):
        if is_stream(path):
            Path(path).write_bytes(content)
        else:
            write_atomically(Path(os.path.realpath(path)), content)


def _bytes(data: str | bytes) -> bytes:
    return data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data


def refuse_foreign(path: Path, data: str | bytes) -> None:
    """Refuse to replace a file that is not an earlier one of what is to be written.

    An earlier one begins with the same line, and names dart-eval near its beginning where the new one does.

    Raises:
        UserError: `--force` replaces it.
    """
    if is_stream(path) or not path.exists():
        return
    with telling(f"{path} cannot be read", "choose another file"), path.open("rb") as file:
        old, new = file.read(HEAD), _bytes(data[:HEAD])[:HEAD]
    if old and (old.partition(b"\n")[0] != new.partition(b"\n")[0] or (MARK in new and MARK not in old)):
        raise UserError(f"{path} holds something else, and would be replaced", "choose another file, or give --force")


def check_target(path: str | Path, remedy: str = "choose another file") -> None:
    """Refuse a path that `write` would refuse, before anything is computed for it.

    Raises:
        UserError: with the reason.
    """
    with telling(f"{path} cannot be written", remedy):
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(target).st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
        place = next(p for p in (target, *target.parents) if p.exists())
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_name(path: str | Path, what: str) -> None:
    """Refuse a path that no file or folder can have, whether or not it exists. what: its name in messages: `--output`.

    Raises:
        UserError: it is empty, too long, holds a NUL, or its links lead nowhere.
    """
    if not str(path):
        raise UserError(f"{what} is empty", "name a file or folder")
    with (
        telling(f"{what} {str(path)[:100]} cannot be a path", "give another path"),
        contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError),
    ):
        os.stat(path)


def safe(text: str) -> str:
    """Return a text as one part of a path; a long one is cut and ends in a hash."""
    part = re.sub(r"[^\w.@=+-]+", "_", text.replace("/", "__")).strip(".")
    if len(part.encode()) > LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        part = f"{part.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"
    return part or "_"


def read_text(path: str | Path, what: str, remedy: str) -> str:
    """Return the text of a file, or pipe, that the user named. what: its name in messages, such as `config`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    with telling(f"{what} {path} cannot be read", remedy):
        if stat.S_ISCHR(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a device")  # which may never end
        return Path(path).read_bytes().decode("utf-8").replace("\r\n", "\n")


def read_regular(path: str | Path) -> bytes:
    """Return the bytes of a file in our own folders, which must be regular: others may never end.

    Raises:
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(path).read_bytes()


def append(path: Path) -> BinaryIO:
    """Open a file of our own folders to add to its end; it is made if it is not there, and a link is not followed.

    Raises:
        OSError: it cannot be written, or is a link, whose target may be anybody's file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.fdopen(os.open(path, flags, 0o644), "ab")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a link; remove it", str(path)) from None
        raise


def is_stream(path: str | Path) -> bool:
    """Whether a path is a pipe, a terminal or a device."""
    return os.path.exists(path) and not os.path.isfile(path)


def format_of(path: Path, format: str | None, formats: Sequence[str]) -> str | None:
    """Return the format of a file: `format` if given, else by its ending; None for a stream.

    Raises:
        UserError: no format is given, and the ending is none of `formats`.
    """
    if format is None and not is_stream(path) and (format := path.suffix[1:]) not in formats:
        endings = ", ".join(f".{f}" for f in formats)
        raise UserError(f"{path} has no ending of a known format", f"use {endings}, or give --format")
    return format


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def write_atomically(path: Path, data: str | bytes, owner: str | None = None) -> None:
    """Write a file that is either old or new, never half, whatever happens meanwhile.

    Args:
        owner: the temporary file is `.{owner}.*`; None: the beginning of the file's own stem.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{owner or path.stem[:40]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
