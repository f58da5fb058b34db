"""The machine: its name, its memory, other processes' use of it, and waiting for its GPU before a clock is read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak in bytes since the block began: of GPU memory, or of the process."""
    if device == "cuda":
        import torch

        cards = range(torch.cuda.device_count())
        for card in cards:
            torch.cuda.reset_peak_memory_stats(card)
        yield lambda: sum(torch.cuda.max_memory_allocated(card) for card in cards)
        return
    # Linux resets VmHWM on request; elsewhere the peak is that of the whole process.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    yield _peak_rss


def hardware(devices: Iterable[torch.device]) -> dict[str, str]:
    """Return the hardware as recorded beside numbers: machine, GPUs or threads, which decide last digits."""
    import torch

    cards = Counter(torch.cuda.get_device_name(d) for d in devices if d.type == "cuda")
    if not cards:
        return {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
    names = [name if count == 1 else f"{count} x {name}" for name, count in sorted(cards.items())]
    return {"machine": platform.machine(), "gpu": ", ".join(names)}


def _peak_rss() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return the bytes of memory that this process may still take, and the total; None if unknown.

    They are the machine's, or those of the control group (a container, a job of a cluster) that leaves least.

    Args:
        root: of the file system.
    """
    try:
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return None  # address space, of which we do not know what is taken
        with open(root / "proc/meminfo", encoding="ascii") as stream:
            sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in stream)}
        found = [(sizes["MemAvailable"], sizes["MemTotal"])]
        with open(root / "proc/self/cgroup", encoding="utf-8") as stream:
            groups = [line.rstrip("\n").split(":", 2) for line in stream]
        for _, controllers, path in groups:
            if controllers not in ("", "memory"):  # "" is version 2, which has one group for all
                continue
            top = root / "sys/fs/cgroup" / controllers
            own = top / path[1:]
            limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            for group in (own, *own.parents[: path.rstrip("/").count("/")]):
                with contextlib.suppress(OSError, ValueError):  # the root of version 2 has none, and "max" is no limit
                    most, taken = (int((group / f"memory.{name}").read_text()) for name in (limit, usage))
                    found.append((most - taken, most))
    except (ImportError, OSError, ValueError, KeyError):  # not Linux
        return None
    return min(found)


def release() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB between others in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def wait(device: torch.device) -> None:
    """Wait until the device has finished, before a clock is read."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds of a call, until the device has finished, and its result."""
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - start, result


@contextlib.contextmanager
def foreign_cpu() -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the mean number of cores used by other processes since; None if unknown."""
    begun, busy, own = time.perf_counter(), _busy(), time.process_time()

    def cores() -> float | None:
        now = _busy()
        if busy is None or now is None:
            return None
        return max(0.0, now - busy - (time.process_time() - own)) / (time.perf_counter() - begun)

    yield cores


def _busy() -> float | None:
    """Return the processors' busy seconds since the machine started, stolen ones included; None if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            ticks = [int(n) for n in stream.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _waiting, interrupt, soft, stolen = ticks
    return (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")


def has_cuda() -> bool:
    """Whether a GPU's driver is there (NVIDIA's, or AMD's, which torch calls cuda, too). Torch is not needed."""
    return os.name == "nt" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def huge_pages() -> str:
    """Return whether weights may lie in huge pages, which are read faster; torch asks for them by a variable."""
    try:
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "huge pages: unknown"
    wanted = "always" if "[always]" in mode else "madvise" if "[madvise]" in mode else "never"
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE", "unset")
    return f"huge pages: {wanted}, THP_MEM_ALLOC_ENABLE {asked}"
