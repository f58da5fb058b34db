"""`dart-eval` in this process, as a process of its own, and runs without a command line.

Processes are forked from a server that has imported everything (`preloaded`): they begin in a fifth of a second. They
are processes in every other way, with their own streams, folder, environment, signals and terminal. Only what Python
and libraries read of the environment when they start is the server's: a locale, the number of threads.
"""

import atexit
import contextlib
import fcntl
import gc
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from dart_eval import cli
from dart_eval.cli import view
from dart_eval.sweep import run, worker

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])

# Before each cell, a worker collects garbage: looking through all that tests imported may take longer than the cell.
worker.gc = SimpleNamespace(collect=lambda: gc.collect(1))
view.LASTS = 3600.0  # seconds: what a command prints in this process does not depend on how busy the machine is
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


# -- in this process ---------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str


def command(*args):
    """Run `dart-eval` with these words in this process; its status and what it wrote."""
    kept = sys.argv, sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    sys.argv, (sys.stdout, sys.stderr), code = ["dart-eval", *map(str, args)], streams, 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(code, *(s.buffer.getvalue().decode() for s in streams))


def run_local(config, view):
    """Run one sweep in this process."""
    return run.begin_sweep([config], view).run_here()


class Watch:
    """Records the events of a run."""

    def __init__(self):
        self.begun, self.done, self.broken, self.notes = [], [], [], []

    def __call__(self, event):
        if event.kind == "started":
            self.begun.append(event.cell.name)
        elif event.kind == "finished":
            self.done.append(event.cell.name)
        elif event.kind == "failed":
            self.broken.append((event.cell.name, event.text, event.where))
        elif event.kind == "note":
            self.notes.append(event.text)


def results(output):
    """The files of finished cells by name; of records what two equal runs share, of all others the bytes."""
    found = {}
    for path in sorted(p for kind in ("cells", "samples", "texts") for p in Path(output, kind).iterdir()):
        found[path.name] = path.read_bytes()
        if path.suffix == ".json":
            found[path.name] = json.loads(found[path.name])
            del found[path.name]["measured"], found[path.name]["digest"]
    return found


# -- processes ---------------------------------------------------------------------------------------------------------


def start(target, *args):
    """A process that calls a function of a module; see `multiprocessing.Process`."""
    here = Path.cwd()
    os.chdir(ROOT)  # where a server that is started now finds the package and these helpers
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    atexit.register(process.kill)  # or one that a failed test has left would be waited for
    return process


class Started:
    """A `dart-eval` under way, much like `subprocess.Popen`."""

    def __init__(self, args, process, kept):
        self.args, self.pid = args, process.pid
        self._process, self._kept = process, kept

    @property
    def stdout(self):
        """All that it has written so far."""
        return self._text("stdout")

    @property
    def stderr(self):
        return self._text("stderr")

    def _text(self, name):
        path = Path(self._kept.name, name)
        return path.read_text("utf-8") if path.exists() else ""

    def poll(self):
        """Its status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=120):
        """Its status once it has ended; as of subprocess, minus the signal that killed it."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def started(*args, cwd=None, env=None, stdin=None, stdout=None, stderr=None, session=False, ignored=(), script=None):
    """Start `dart-eval` with these words as a process.

    Args:
        script: a Python file that is run instead, with these words.
        env: the whole environment, as for subprocess; None is this process's.
        stdin, stdout, stderr: file descriptors; None reads nothing, or keeps the text for the handle to show.
        session: it leads a session and a process group, whose terminal is its standard input if that is one.
        ignored: signals that it ignores from the start; all others do what they do by default.
    """
    kept, passed = tempfile.TemporaryDirectory(prefix="dart-eval-"), []
    for given, name in ((stdin, os.devnull), (stdout, f"{kept.name}/stdout"), (stderr, f"{kept.name}/stderr")):
        number = os.open(name, os.O_RDWR | os.O_CREAT) if given is None else os.dup(given)
        passed.append(Connection(number))  # the kind of object that takes a descriptor along
    words = [str(a) for a in args]
    folder, environment = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
    name = "dart-eval" if script is None else str(script)
    process = start(_become, name, words, folder, environment, passed, session, tuple(ignored), sys.executable)
    for connection in passed:
        connection.close()
    return Started([name, *words], process, kept)


def program(*args, timeout=300, **options):
    """Run `dart-eval` with these words as a process, to its end; options as of `started`."""
    process = started(*args, **options)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, code, process.stdout, process.stderr)


def until(condition, process=None, timeout=120):
    """Wait until a condition holds; a process that ends meanwhile is an error."""
    end = time.monotonic() + timeout
    while not condition():
        assert process is None or process.poll() is None, process.stderr
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def _become(name, words, folder, environment, passed, session, ignored, python):
    """In a process that has just been forked: be `dart-eval`, or a script."""
    if session:
        os.setsid()
    for number, connection in enumerate(passed):
        os.dup2(connection.fileno(), number)
        connection.close()
    if session and os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in STOPPING:
        # A signal that comes before `cli.main` has its handlers ends the process without a word.
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.executable = [name, *words], python
    try:
        if name == "dart-eval":
            cli.main()
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of a program; multiprocessing leaves them out, and Ray needs its own


class Forked:
    """In the place of `subprocess.Popen` of `python -c CODE`: the code in a process that is forked (`started`)."""

    def __init__(self, words, stdin, stdout, stderr, env):
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "wb")
        self.code = tempfile.NamedTemporaryFile("w", suffix=".py")  # noqa: SIM115 - it lives as long as this
        self.code.write(words[-1])
        self.code.flush()
        self.process = started(
            script=self.code.name, stdin=theirs, stdout=stdout.fileno(), stderr=stderr.fileno(), env=env
        )
        self.wait, self.poll = self.process.wait, self.process.poll
        os.close(theirs)

    def terminate(self):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self.process.send_signal(signal.SIGTERM)
