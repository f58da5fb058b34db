"""Damaged files of every kind, read in a guarded process: one line or the right numbers, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from scripts.torture.ledger import Result, Unit, drawn
from scripts.torture.sweep import Whole
from tests.helpers.commands import CONTEXT, start

MEMORY = 6 << 30  # bytes that a guarded process may take beyond what it has
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")
PARTS, SHORT = 5, 12  # units of a kind; cases of a kind in the short version


class Of(NamedTuple):
    """What there is of a kind: where its class stands, how many cases, and in how many once a new process reads it."""

    driver: str
    cases: int
    every: int  # negative: not where that loads a model


KINDS = {
    "config": Of("kinds.Config", 2000, 200), "methods": Of("kinds.Methods", 2400, 300),
    "thresholds": Of("kinds.Thresholds", 2000, 250), "baselines": Of("stored.Baselines", 1000, 200),
    "records": Of("stored.Records", 160, 20), "samples": Of("stored.Samples", 120, 20),
    "journals": Of("stored.Journals", 120, 60), "data rows": Of("loaded.DataRows", 300, 100),
    "config.json": Of("loaded.ModelFolder", 300, 60), "gguf": Of("loaded.Gguf", 300, 60),
}  # fmt: skip


class Wrong(AssertionError):
    """What must not be."""


class Late(BaseException):
    """A case takes longer than it may."""


def units(folder: Path, seed: int, short: bool) -> Iterator[Unit]:
    """Some cases of a kind each."""
    for kind, of in KINDS.items():
        numbers, size = (range(SHORT), SHORT) if short else (range(of.cases), of.cases // PARTS)
        for part, first in enumerate(numbers[::size]):
            asked = [*numbers[first : first + size]]
            work = functools.partial(_cases, folder, seed, kind, asked, short)
            yield Unit(f"fuzz/{kind} {part}", f"fuzz: {kind}", work)


def _cases(folder: Path, seed: int, kind: str, numbers: Sequence[int], short: bool) -> Result:
    Whole(folder)
    of = KINDS[kind]._replace(driver=f"scripts.torture.{KINDS[kind].driver}")
    return watched(folder, seed, kind, of._replace(every=-SHORT) if short else of, numbers)


def watched(folder: Path, seed: int, kind: str, of: Of, numbers: Sequence[int]) -> Result:
    """Cases in a guarded process; one that hangs or dies is ended, and another goes on after its case."""
    result, todo, place = Result(), list(numbers), folder / "fuzz" / kind.replace(" ", "-")
    while todo:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        ours, theirs = CONTEXT.Pipe()
        process = start(_begin, theirs, dict(os.environ), str(folder), str(place), seed, kind, of, todo)
        theirs.close()
        at, limit, late = None, 300.0, False  # for what is prepared
        with contextlib.suppress(EOFError):
            while ours.poll(limit):
                said, *more = ours.recv()
                if said == "begun":
                    at, limit = more
                    limit += 200  # of a new process; and what stands in compiled code hears of no alarm
                    result.tried += 1
                    todo.remove(at)
                elif said == "ended":
                    result.count(more[0])
                    result.count("also in a new process", more[1])
                    at, limit = None, 60.0
                elif said == "fell":
                    result.fell.append(f"{kind}, seed {seed}, case {at}: {more[0]}")
                    at, limit = None, 60.0
                elif said == "broken":
                    raise RuntimeError(f"{kind}: {more[0]}")
                else:
                    break
            else:
                late = True
        process.join(0 if late else 10)
        process.kill()
        process.join()
        if at is not None:
            why = "it hangs" if late else f"the process died (status {process.exitcode})"
            result.fell.append(f"{kind}, seed {seed}, case {at}: {why}")
        elif todo:
            raise RuntimeError(f"{kind}: the guarded process ended between two cases (status {process.exitcode})")
    return result


def _begin(pipe: Connection, environment: dict[str, str], *given: Any) -> None:
    os.environ.update(environment)  # this process was forked from one that may have another
    try:
        _work(pipe, *given)
    except BaseException:
        pipe.send(("broken", traceback.format_exc()))


def _work(pipe: Connection, folder: str, place: str, seed: int, kind: str, of: Of, numbers: Sequence[int]) -> None:
    """In the guarded process: case by case, told to the other end of the pipe."""
    from dart_eval.util.errors import UserError

    os.chdir(place)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    tempfile.tempdir = None  # that of the environment
    module, _, name = of.driver.rpartition(".")
    made = getattr(importlib.import_module(module), name)(Path(folder), Path(place))
    guard = Guard([place, os.environ["TMPDIR"], os.environ["DART_EVAL_CACHE"], os.environ["HF_DATASETS_CACHE"]])
    signal.signal(signal.SIGALRM, _late)
    for number in numbers:
        pipe.send(("begun", number, made.limit))
        random, begun = drawn(seed, f"{kind} {number}"), time.monotonic()
        try:
            with guard, made.beside():
                signal.setitimer(signal.ITIMER_REAL, made.limit)
                try:
                    ended = made.case(random)
                except UserError as error:
                    ended = one_line(str(error))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            real = bool(made.words) and number % of.every == 0 and not (of.every < 0 and made.slow)
            if real:
                for_real(made.words, place)
            pipe.send(("ended", ended, real))
        except Wrong as error:
            pipe.send(("fell", str(error)[:600]))
        except Late:
            pipe.send(("fell", f"no end after {time.monotonic() - begun:.0f} s: {made.told}"))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
            pipe.send(("fell", f"{why}: {made.told}"))
    pipe.send(("done",))


def _late(*_: object) -> None:
    raise Late


def one_line(said: str) -> str:
    """What a refusal must be."""
    if "\n" in said or len(said) > 6000 or any(ord(c) < 32 or c == "\u202e" for c in said):
        raise Wrong(f"a refusal is no line: {said[:300]!r}")
    return "refused"


def for_real(words: list[str], place: str) -> None:
    """The command in a new process."""
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dart_eval", *words], cwd=place, capture_output=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        raise Wrong(f"no end after {time.monotonic() - begun:.0f} s: {words}") from None
    errors = done.stderr.decode(errors="replace")
    if done.returncode not in (0, 1, 2) or "Traceback" in errors or "\x1b" in errors:
        raise Wrong(f"{words} ends with {done.returncode}: {errors[-400:]!r}")


class Guard:
    """While it is entered: this process starts no other, writes only below some folders, and has a limit of memory."""

    def __init__(self, roots: list[str]) -> None:
        self.roots = (*(os.path.realpath(root) + os.sep for root in roots), "/dev/", "/proc/")
        self.entered, self.strays = False, list[str]()
        self.most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.entered:
            return
        if event in STARTS and not (event == "subprocess.Popen" and args[0] in TOLERATED):
            self.strays.append(f"{event} {args[:2]!r}")
        elif event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            path = args[0]
            if isinstance(path, (str, bytes, os.PathLike)):
                full = os.path.realpath(os.fsdecode(path)) + os.sep
                if not full.startswith(self.roots):
                    self.strays.append(f"{event} {full[:-1]}")

    def __enter__(self) -> None:
        self.strays.clear()
        resource.setrlimit(resource.RLIMIT_AS, (self.most, resource.RLIM_INFINITY))
        self.entered = True

    def __exit__(self, *_: object) -> None:
        self.entered = False
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.strays:
            raise Wrong(f"outside its folder: {self.strays[:3]}")


TOLERATED = ("git", "uname", "lscpu", "/bin/sh", "lsb_release")  # what a record's environment asks
