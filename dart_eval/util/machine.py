"""The machine: its name, its memory, and waiting for its GPU before a clock is read."""

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
    import torch

    cards = range(torch.cuda.device_count()) if device == "cuda" else ()
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    # Linux resets VmHWM on request; elsewhere the peak is that of the whole process.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    yield lambda: sum(map(torch.cuda.max_memory_allocated, cards)) if cards else _peak_rss()


def hardware(devices: Iterable[torch.device]) -> dict[str, str]:
    """Return the hardware as recorded beside numbers: machine, GPUs or threads, which decide last digits."""
    import torch

    cards = Counter(torch.cuda.get_device_name(d) for d in devices if d.type == "cuda")
    names = [name if count == 1 else f"{count} x {name}" for name, count in sorted(cards.items())]
    kind = {"gpu": ", ".join(names)} if names else {"threads": str(torch.get_num_threads())}
    return {"machine": platform.machine(), **kind}


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
    """
    try:
        lines = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in lines}
        found = [(sizes["MemAvailable"], sizes["MemTotal"])]
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):  # "" is version 2, which has one group for all
                continue
            top = root / "sys/fs/cgroup" / controllers
            own = top / path[1:]
            limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            for group in (own, *own.parents[: path.rstrip("/").count("/")]):
                with contextlib.suppress(OSError, ValueError):  # the root of version 2 has none, and "max" is no limit
                    most, taken = (int((group / f"memory.{name}").read_text()) for name in (limit, usage))
                    found.append((most - taken, most))
    except (OSError, ValueError, KeyError):  # not Linux
        return None
    return min(found)


def release() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB between others in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds of a call, until the device has finished, and its result."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - start, result


def has_cuda() -> bool:
    """Whether a GPU's driver is there (NVIDIA's, or AMD's, which torch calls cuda, too). Torch is not needed."""
    return os.name == "nt" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
