"""`--workers N`: N copies of a run on this machine share its cells.

Each claims one cell after another (`Sweep.claim`), on a GPU of its own or on its share of the processors, and writes
what it makes. This process shows what they have finished. A cell that killed its process has failed in this run; the
same command tries it again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dart_eval.sweep import run
from dart_eval.sweep.events import Event, Tell, silent
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.run import RunResult, begin_sweep, run_rest
from dart_eval.util.errors import writing

POLL = 0.5  # seconds between looks at the workers
# An empty entry of the path is the working directory, which nothing is imported from.
BEGIN = "import sys; sys.path[:] = filter(None, sys.path); from dart_eval.sweep.workers import serve; serve()"


def run_all(configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False) -> RunResult:
    """See `cluster.run.run_all`. What no worker could begin runs in this process, which says why.

    Raises:
        UserError: the input is wrong.
    """
    since = time.time()
    sweep = begin_sweep(configs, tell, skip_missing, since=since)
    count, cards = min(configs[0].workers, len(sweep.todo)), _cards(configs[0])
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, count)) if hasattr(os, "sched_getaffinity") else 1
    with contextlib.ExitStack() as stack:

        def start(place: int) -> subprocess.Popen[bytes]:
            card = {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]} if cards else {"OMP_NUM_THREADS": str(threads)}
            return stack.enter_context(_worker(_log(sweep.store.folder, place), card, (configs, skip_missing, since)))

        running = {place: start(place) for place in range(count)}
        while running:
            time.sleep(POLL)
            ended = {place: status for place, p in running.items() if (status := p.poll()) is not None}
            failed = len(sweep.failed)
            sweep.look()
            for place, status in ended.items():
                del running[place]
                if status:
                    how = f"signal {-status}" if status < 0 else f"status {status}"
                    text = f"worker {place + 1} died ({how}); see {_log(sweep.store.folder, place)}"
                    tell(Event("note", text))
                    if sweep.todo and len(sweep.failed) > failed:  # at a cell, and not before its first
                        running[place] = start(place)
    return run_rest(sweep, configs[0])


def _log(folder: Path, place: int) -> Path:
    return folder / "logs" / f"worker-{place + 1}.log"


@contextlib.contextmanager
def _worker(log: Path, environment: dict[str, str], asked: tuple[Any, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a run (see `serve`), which ends with the block."""
    with writing(log.parent.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    with file:
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN], stdin=subprocess.PIPE, stdout=file, stderr=file,
            env={**os.environ, **environment},
        )  # fmt: skip
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it died
            pickle.dump(asked, pipe)
        yield process
    finally:
        process.terminate()
        process.wait()


def _cards(config: RunConfig) -> list[str]:
    """Return the GPUs that workers may use, as `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    from dart_eval.models.loading import choose_device

    if choose_device(config.device).type != "cuda":
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def serve() -> None:
    """Run the sweep that comes on stdin, in a worker."""
    from dart_eval.util.quiet import silence

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # it leaves no mark on its cell
    silence()
    configs, skip_missing, since = pickle.load(sys.stdin.buffer)
    run.run_all(configs, silent, skip_missing, since=since)
