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

import torch

from dart_eval.models.loading import choose_device
from dart_eval.sweep import run
from dart_eval.sweep.events import Event, Tell, silent
from dart_eval.sweep.options import RunConfig
from dart_eval.util.errors import Misfit, writing
from dart_eval.util.files import append
from dart_eval.util.quiet import silence

POLL = 0.5  # seconds between looks at the workers
# An empty entry of the path is the working directory, which nothing is imported from.
BEGIN = "import sys; sys.path[:] = filter(None, sys.path); from dart_eval.sweep.workers import serve; serve()"


def run_all(configs: Sequence[RunConfig], tell: Tell, skip_missing: bool = False) -> run.Sweep:
    """See `cluster.run.run_all`. What no worker could begin runs in this process, which says why.

    Raises:
        UserError: the input is wrong.
    """
    first, since = configs[0], time.time()
    sweep = run.begin_sweep(configs, tell, skip_missing, since=since)
    count, cards = min(first.workers, len(sweep.todo)), list[str]()
    if choose_device(first.device).type == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    threads = str(max(1, torch.get_num_threads() // max(1, count)))

    def start(place: int) -> subprocess.Popen[bytes]:
        part = {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]} if cards else {"OMP_NUM_THREADS": threads}
        return workers.enter_context(_worker(logs / f"worker-{place + 1}.log", part, (configs, skip_missing, since)))

    logs = sweep.store.folder / "logs"
    with contextlib.ExitStack() as workers:
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
                    tell(Event("note", f"worker {place + 1} died ({how}); see {logs}/worker-{place + 1}.log"))
                    if sweep.todo and len(sweep.failed) > failed:  # at a cell, and not before its first
                        running[place] = start(place)
    return sweep.run_here()


@contextlib.contextmanager
def _worker(log: Path, environment: dict[str, str], asked: tuple[Any, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a run (see `serve`), which ends with the block."""
    with writing(log.parent.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = append(log)
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


def serve() -> None:
    """Run the sweep that comes on stdin, in a worker."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # it leaves no mark on its cell
    silence()
    configs, skip_missing, since = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(Misfit):  # which the run itself says
        run.begin_sweep(configs, silent, skip_missing, since=since).run_here()
