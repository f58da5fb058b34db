"""The kernels as a library that a process loads: compiled on first use with the machine's C compiler, then kept.

In C: numba 0.68, which needs no compiler at the user's, reaches 79 % of a C prototype's speed in the bfloat16 product,
and 21 % in the product of 4 bits. The library lies in the cache folder, named by a hash of source, flags and
processor, so that one built with an image serves where no compiler is, and ends in a digest of itself: what is damaged
is made anew. It needs nothing of torch or Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dart_eval.util.files import cache_dir, write_atomically

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-math-errno",
    "-fno-trapping-math", "-w",
)  # fmt: skip
SECONDS = 120  # that a compiler may take
LEVELS = {"avx2": 1, "avx512": 2}  # as `cpu_level` in the source counts them
WANTED = "DART_EVAL_CPU_LEVEL"
DIGEST = hashlib.sha256().digest_size


class Missing(Exception):
    """There are no kernels here; its text says why, in a few words."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the kernels, built if need be.

    Raises:
        Missing: there is no compiler, or the processor is another one.
    """
    if os.name != "posix" or platform.machine().lower() not in ("x86_64", "amd64"):
        raise Missing(f"the kernels for CPUs are for x86-64 under Linux or macOS, not {platform.machine()}")
    kernels = _load(_folder())
    if not kernels.cpu_level():
        raise Missing("the processor has no AVX2")
    return kernels


def why_no_kernel() -> str | None:
    """Return why there are no kernels for this machine's CPU, or None."""
    return _why_no_kernel(os.environ.get(WANTED))


@functools.cache
def _why_no_kernel(wanted: str | None) -> str | None:
    try:
        level(wanted)
    except Missing as error:
        return str(error)
    return None


def level(wanted: str | None = None) -> int:
    """Return the instructions that kernels use, as the source counts them.

    Args:
        wanted: `avx2`, `avx512`; None: what is in $DART_EVAL_CPU_LEVEL, else the best that the processor has.

    Raises:
        Missing: the processor has not got them.
    """
    best = int(library().cpu_level())
    if not (name := wanted or os.environ.get(WANTED)):
        return best
    if name not in LEVELS:
        raise Missing(f"${WANTED} is {name}, which is none of {', '.join(LEVELS)}")
    if LEVELS[name] > best:
        raise Missing(f"the processor has no {name}")
    return LEVELS[name]


def _load(folder: Path | None) -> ctypes.CDLL:
    """Return the library of a folder, built where it is not there or damaged. folder: None: of none that stays."""
    sources = [file.read_bytes() for file in sorted(SOURCE.parent.glob("*.[ch]"))]
    made_for = " ".join([*FLAGS, platform.system(), platform.machine()])
    key = hashlib.sha256(b"\0".join([*sources, made_for.encode()])).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        file = (folder or stack.enter_context(_temporary())) / f"kernels-{key}.so"
        with _lock(folder):  # workers that begin together do not all compile
            if folder is None or not _is_intact(file):
                content = _compile(_compiler(), stack.enter_context(_temporary()))
                try:
                    write_atomically(file, content + hashlib.sha256(content).digest())
                except OSError:
                    return _load(None)
        try:
            return ctypes.CDLL(str(file))
        except OSError as error:  # e.g. a folder from which nothing may be run
            if folder is not None:
                return _load(None)
            raise Missing(f"the kernels cannot be loaded ({error})") from None


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """Yield a folder for a library that does not stay."""
    try:
        made = tempfile.TemporaryDirectory(prefix="dart-eval-")
    except OSError as error:
        raise Missing(f"there is no folder to build the kernels in ({error})") from None
    with made as place:
        yield Path(place)


@contextlib.contextmanager
def _lock(folder: Path | None) -> Iterator[None]:
    """Wait until no other process builds in a folder. Without a lock, where none can be had, all build."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl  # not on Windows

            if folder is not None:
                fcntl.flock(stack.enter_context(folder.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _is_intact(file: Path) -> bool:
    """Whether a library is there and as it was written: half of one would crash the process that loads it."""
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
    return False


def _folder() -> Path | None:
    """Return the folder of libraries; None where its files could be somebody else's, or follow the working folder."""
    place = cache_dir() / "kernels"
    if not place.is_absolute():
        return None
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
        if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return place
    return None


def _path() -> str:
    """Return $PATH without what follows the working folder."""
    return os.pathsep.join(p for p in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(p))


def _compiler() -> str:
    """Return a C compiler that runs.

    Raises:
        Missing: none is there.
    """
    for name in COMPILERS:
        if (found := shutil.which(name, path=_path())) is not None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run([found, "--version"], **_run_options("/"), check=True, timeout=SECONDS)
                return found
    raise Missing(f"no C compiler ({', '.join(COMPILERS)}) is on the PATH to build the kernels for CPUs")


def _compile(compiler: str, place: Path) -> bytes:
    """Return the library's content, compiled in a folder of its own."""
    out = place / "kernels.out"
    try:
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(out), "-lm"], **_run_options(place), check=True, timeout=SECONDS
        )
        return out.read_bytes()
    except subprocess.TimeoutExpired:
        raise Missing(f"{compiler} took more than {SECONDS} s to build the kernels for CPUs") from None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip().splitlines()
        why = said[0] if said else str(error)
        raise Missing(f"{compiler} cannot build the kernels for CPUs ({why[:200]})") from None


def _run_options(place: str | Path) -> dict:
    return {"cwd": place, "env": os.environ | {"PATH": _path()}, "stdin": subprocess.DEVNULL, "capture_output": True}
