"""Signals at random moments: run, check and export of a small sweep, each given again until it has its way."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.torture.ledger import Result, Unit, drawn
from scripts.torture.sweep import CHECK, EXPORT, RUN, UPDATE, Whole
from tests.helpers.commands import started

SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
AFTER = 60.0  # seconds in which a process must end once it has its signal
IMPORTS = 6.0, 1.0  # about how many seconds a new process takes for imports: of a run, of others
STAGES = ((RUN, 12), (UPDATE, 2), (CHECK, 3), (EXPORT, 3))  # a command, and how many of a sweep's kills it gets


class Kill(NamedTuple):
    """A signal that comes after so many seconds. cold: to a new Python process."""

    number: int
    seconds: float
    cold: bool


def units(folder: Path, seed: int, short: bool) -> Iterator[Unit]:
    """Sweeps of twenty kills."""
    for number in range(1 if short else 10):
        name = f"kills/sweep {number}"
        yield Unit(name, "kills", functools.partial(_sweep, folder, name, drawn(seed, name), short))


def _sweep(folder: Path, name: str, moments: random.Random, short: bool) -> Result:
    """All stages; what is left must be an undisturbed sweep's."""
    whole, place, result = Whole(folder), folder / name.replace("/", "-").replace(" ", "-"), Result()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    finished: dict[Path, bytes] = {}
    for words, kills in STAGES:
        todo = result.tried + (max(1, kills // 4) if short else kills)
        ended = True
        while result.tried < todo or not ended:
            if ended and words is RUN:  # all of it is there: another sweep
                result.fell += [f"{name}: {line}" for line in whole.differences(place, words)]
                shutil.rmtree(place / "out", ignore_errors=True)
                finished.clear()
            cold = result.tried % 10 == 9 or (short and result.tried == 1)
            seconds = whole.seconds[words[0]] / (3 if words is RUN else 1) + cold * IMPORTS[words is not RUN]
            kill = (
                Kill(moments.choice(list(SIGNALS)), seconds * moments.random(), cold) if result.tried < todo else None
            )
            ended, fell = _given(words, place, kill, result)
            for file in sorted((place / "out" / "cells").glob("*.json")):
                if finished.setdefault(file, file.read_bytes()) != file.read_bytes():
                    fell.append(f"{file.name} was finished, and has changed")
            result.fell += [f"{name}, {words[0]}, {kill}: {line}" for line in fell]
            if fell and kill is None:
                return result
        result.fell += [f"{name}: {line}" for line in whole.differences(place, words)]
    shutil.rmtree(place)
    return result


def _given(words: tuple[str, ...], place: Path, kill: Kill | None, result: Result) -> tuple[bool, list[str]]:
    """Give a command and perhaps a signal. Whether it came to its own end, and what is wrong with how it ended."""
    cold = kill is not None and kill.cold
    process = _new(words, place) if cold else started(*words, cwd=place)
    try:
        status = process.wait(600 if kill is None else kill.seconds)
    except subprocess.TimeoutExpired:
        if kill is None:
            process.kill()
            return False, ["no end after 600 s"]
        return _killed(process, place, kill, result)
    errors = _errors(process, place)
    if kill is not None:
        result.count("came too late")
    return True, [] if status == 0 and not _faults(errors) else [f"status {status}: {errors[-600:]!r}"]


def _killed(process: Any, place: Path, kill: Kill, result: Result) -> tuple[bool, list[str]]:
    process.send_signal(kill.number)
    sent = time.monotonic()
    result.tried += 1
    result.count(signal.Signals(kill.number).name)
    result.count("to a new process", kill.cold)
    try:
        status = process.wait(AFTER)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # Python's fault handler says where it stands
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        return False, [f"no end {AFTER:.0f} s after its signal: {_errors(process, place)[:3000]}"]
    seconds, errors = time.monotonic() - sent, _errors(process, place)
    if status == SIGNALS[signal.Signals(kill.number)] and not _faults(errors):
        return False, []
    if status == -kill.number or "KeyboardInterrupt" in errors:  # Python's own ways: our handlers were not there yet
        result.count("before it began")
        return False, []
    if status == 0 and not _faults(errors) and seconds < 2:
        result.count("as it ended")
        return True, []
    return status == 0, [f"status {status}, {seconds:.1f} s after its signal: {errors[-600:]!r}"]


def _new(words: tuple[str, ...], place: Path) -> subprocess.Popen[str]:
    """The command in a Python process of its own, as a shell starts it in the foreground."""
    with (place / "errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "dart_eval", *words], cwd=place, stdout=subprocess.DEVNULL, stderr=errors, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def _errors(process: Any, place: Path) -> str:
    return str((place / "errors").read_text() if isinstance(process, subprocess.Popen) else process.stderr)


def _faults(errors: str) -> list[str]:
    """The lines of stderr that are no progress and no note."""
    found = errors.splitlines()
    return [line for line in found if line.startswith(("error", "failed", "missing", "Traceback")) or "Error" in line]
