"""Files that a user names, read and written in the same way by every verb.

A regular file is old or new, never half. Pipes and devices (/dev/stdout, /dev/null) are written to and never replaced;
a symbolic link's target is written. All text is UTF-8, whatever the locale.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dart_eval.util.errors import UserError

LINKS = 40  # as many as Linux follows
HEAD = 4096  # bytes that identify a file of ours
WRITER_COMES = 2.0  # most seconds to wait for a writer of a pipe
LONGEST = 100  # bytes of a part of a path: file systems take 255, and endings are added
# Names that Windows keeps for its devices, whatever their ending.
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(1, 10))}


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


def write(path: str | Path, data: str | bytes, remedy: str = "choose another file") -> None:
    """Write a file that the user named.

    Raises:
        UserError: it cannot be written. BrokenPipeError: nobody reads the pipe any more.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        number = _own_stream(path)
        if number is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            with open(number, "wb", closefd=False) as own:
                own.write(content)
            return
        target = _target(path)
        if is_stream(target):
            with open(target, "wb") as opened:
                opened.write(content)
        else:
            write_atomically(target, content)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({reason(error)})", remedy) from None


def check_target(path: str | Path, remedy: str = "choose another file") -> None:
    """Refuse a path that `write` would refuse, before anything is computed for it.

    Raises:
        UserError: with the reason.
    """
    try:
        if _own_stream(path) is not None:
            return
        target = _target(path)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        place = target if is_stream(target) else target.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        if not is_stream(target) and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with contextlib.suppress(FileNotFoundError):  # a name too long shows only here
            os.stat(target)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({reason(error)})", remedy) from None


def check_own(path: str | Path, begins: re.Pattern[bytes], what: str) -> None:
    """Refuse to replace a file that is neither empty nor ours.

    Args:
        begins: pattern in the first bytes of every file of ours.
        what: kind of such a file, for the message.

    Raises:
        UserError: the file is not ours.
    """
    if is_stream(path):
        return
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
    except (OSError, ValueError):  # nothing is there, or `check_target` has refused it
        return
    if head and not begins.search(head):
        raise UserError(f"{path} is not a {what}, and would be overwritten", "choose another file, or give --force")


def check_name(path: str | Path, what: str) -> None:
    """Refuse a path that no file or folder can have, whether or not it exists.

    Args:
        what: the path's name in messages, such as `--output`.

    Raises:
        UserError: it is empty, too long, holds a NUL, or its links lead nowhere.
    """
    if not str(path):
        raise UserError(f"{what} is empty", "name a file or folder")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(path)
    except (OSError, ValueError) as error:
        short = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}..."
        raise UserError(f"{what} {short} cannot be a path ({reason(error)})", "give another path") from None


def safe(text: str) -> str:
    """Return a text as one part of a path, valid on every system; a long one is cut and ends in a hash."""
    kept = re.sub(r"[^\w.@=+-]+", "_", text.replace("/", "__")).strip(".")
    if kept.partition(".")[0].upper() in DEVICES:
        kept = f"_{kept}"
    if len(kept.encode()) > LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        kept = f"{kept.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"
    return kept or "_"


def read_text(path: str | Path, what: str, remedy: str) -> str:
    """Return the text of a file, or pipe, that the user named.

    Args:
        what: the file's name in messages, such as `config`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return _bytes(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        why = f"not UTF-8 text: byte {error.object[error.start]:#04x} in line {line}"
        raise UserError(f"{what} {path} cannot be read ({why})", remedy) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} cannot be read ({reason(error)})", remedy) from None


def _bytes(path: str | Path) -> bytes:
    """Return all bytes of a file, or of a pipe with a writer."""
    mode = os.stat(path).st_mode
    if stat.S_ISCHR(mode):
        raise OSError(errno.EINVAL, "it is a device")
    if not stat.S_ISFIFO(mode):
        return Path(path).read_bytes()
    end = time.monotonic() + WRITER_COMES
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while (begun := pipe.read()) == b"":  # no writer; None: a writer that has written nothing yet
            if time.monotonic() > end:
                raise OSError(errno.EPIPE, "a pipe that nobody writes into")
            time.sleep(0.02)
        os.set_blocking(pipe.fileno(), True)
        return (begun or b"") + pipe.read()


def read_regular(path: str | Path) -> bytes:
    """Return the bytes of a file in our own folders, which must be regular: others may never end.

    Raises:
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(path).read_bytes()


def is_stream(path: str | Path) -> bool:
    """Whether a path is a stream: a pipe, a terminal or a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return _own_stream(path) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def format_of(path: Path, format: str | None, formats: Sequence[str]) -> str | None:
    """Return the format of a file: `format` if given, else by its ending; None for a stream.

    Raises:
        UserError: no format is given, and the ending is none of `formats`.
    """
    if format is not None or is_stream(path):
        return format
    if path.suffix[1:] not in formats:
        endings = ", ".join(f".{f}" for f in formats)
        raise UserError(f"{path} has no ending of a known format", f"use {endings}, or give --format")
    return path.suffix[1:]


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


def _target(path: str | Path) -> Path:
    """Return the target of a path's links, which need not exist."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _own_stream(path: str | Path) -> int | None:
    """Return the descriptor of this process that a path names (/dev/stdout, /dev/fd/3), or None.

    Such a path must not be opened a second time, so that output follows what was written before.
    """
    place = os.path.abspath(path)
    for _ in range(LINKS):
        place = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
        if match := re.fullmatch(rf"(?:/proc/{os.getpid()}(?:/task/\d+)?|/dev)/fd/(\d+)", place):
            return int(match[1])
        if not os.path.islink(place):
            return None
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    return None
