"""Break the numeric core in many small ways, and see whether the fast lane of the tests notices each.

    python scripts/mutate.py                              # the hundred of tests/mutation/operators.py
    python scripts/mutate.py --sample 10 --seed 202648    # as CI does
    python scripts/mutate.py --only drift.py --near       # those of a module, without the tests of others

One process imports torch and the like and forks a child for each mutant, in which an import hook hands the changed
source to Python: no file is written. The child runs the test that noticed the mutant last time (results/mutations.md),
those about its module, then all of the fast lane, and stops at the first failure. A test that hangs counts as a
failure. The whole list is run only where the fast lane passes without any mutant; after a sample the tests that failed
are run without one.
Exit status: 0; 1 (more mutants survive than --least allows, not counting those that no test can notice); 2 (the tests
fail without any mutant).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "results" / "mutations.md"
sys.path.insert(0, str(ROOT))

from mutation_report import Result, noticed_by, report  # noqa: E402 - the script's own folder is on the path

from tests.mutation.operators import Mutant, mutants  # noqa: E402 - the repository is no installed package

PRELOADED = (
    "torch", "transformers", "lm_eval.evaluator", "lm_eval.models.huggingface", "scipy.stats", "sacrebleu.metrics",
    "evaluate", "torch._dynamo", "torch.utils.flop_counter", "transformers.masking_utils", "matplotlib.figure",
    "typer.testing", "hypothesis", "pytest",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "gemma3", "gpt2", "opt", "phi3")),
)  # fmt: skip
HANG = 60  # seconds of a processor that a test may take
LIMIT = 3600  # seconds of a clock for all tests of a mutant
WIDE = ("tests/derivations", "tests/golden")  # of the whole core
HANGS = " (it hangs)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked, print a line for each mutant; the exit status."""
    options = _options(arguments)
    chosen = [m for m in mutants(options.every) if options.only in m.file or options.only in m.what]
    if options.sample:
        chosen = [m for m in chosen if not m.survives]  # each would run the whole lane, and tell nothing
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
        print(f"{len(chosen)} mutants, drawn with --seed {options.seed}", flush=True)
    known = _known(options.resume)
    todo = [m for m in chosen if _name(m) not in known]
    if todo:
        _preload()
    whole = not (options.sample or options.only or options.near or known)
    if todo and whole and not _pass(["tests"]):
        return 2
    before = noticed_by(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    for mutant, result in _run([(m, _rounds(m, options.near, before)) for m in todo], options.jobs):
        assert mutant is not None
        known[_name(mutant)] = result
        print(f"{result.seconds:5.0f} s  {result.by or 'SURVIVES'}  <- {mutant.file}: {mutant.what}", flush=True)
        if options.resume:
            with options.resume.open("a") as file:
                file.write(json.dumps({"name": _name(mutant), **asdict(result)}) + "\n")
    found = [(m, known[_name(m)]) for m in chosen]
    by = {r.by.removesuffix(HANGS) for _, r in found if r.by.startswith("tests")}
    if todo and not whole and by and not _pass(sorted(by)):
        return 2
    if options.output:
        options.output.write_text(report(found), encoding="utf-8")
    missed = [m for m, result in found if not result.by and not m.survives]
    print(f"{sum(bool(r.by) for _, r in found)} of {len(found)} mutants are noticed; {len(missed)} are missed.")
    return int(len(missed) > (1 - options.least) * len(found) + 1e-9)


def _pass(tests: Sequence[str]) -> bool:
    """Whether these pass without any mutant; else it is said which does not."""
    result = next(_run([(None, [tests])], 1))[1]
    if result.by:
        print(f"Without any mutant the tests fail: {result.by}\n{result.log}", file=sys.stderr)
    else:
        print(f"Without any mutant the tests pass ({result.seconds:.0f} s).", flush=True)
    return not result.by


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="draw so many instead of all")
    parser.add_argument("--every", action="store_true", help="of all that operators make, not of the hundred")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--least", type=float, default=1.0, help="fail where a smaller share than this is noticed")
    parser.add_argument("--only", default="", help="those whose file or description has this text")
    parser.add_argument("--near", action="store_true", help="leave out the tests of other modules: quick")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--output", type=Path, help="the report, Markdown")
    parser.add_argument("--resume", type=Path, help="a file of results so far: what it has is not run again")
    return parser.parse_args(arguments)


@functools.cache
def _ranks() -> dict[Mutant, int]:
    """Of each mutant how many stand before it that do the same in the same function."""
    seen: dict[tuple[str, str], int] = {}
    found = {}
    for mutant in mutants(every=True):
        same = mutant.file, mutant.what
        found[mutant] = seen[same] = seen.get(same, -1) + 1
    return found


def _name(mutant: Mutant) -> str:
    """A hash that stays while other code of the file changes."""
    return hashlib.sha256(json.dumps([mutant.file, mutant.what, _ranks()[mutant]]).encode()).hexdigest()[:16]


def _known(file: Path | None) -> dict[str, Result]:
    if file is None or not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line.pop("name"): Result(**line) for line in lines}


def _preload() -> None:
    """What children share: all that is slow to import, but neither dart_eval nor a test."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "dart_eval" for name in sys.modules)


@dataclass
class Child:
    """A process at work on a mutant."""

    mutant: Mutant | None
    folder: Path
    start: float

    def result(self, status: int, seconds: float, over_time: bool) -> Result:
        """What came out, once it has ended."""
        file = self.folder / "by"
        log = (self.folder / "log").read_text(errors="replace")[-2000:]
        if file.exists():
            by = file.read_text()
        else:
            by = f"no end after {LIMIT} s" if over_time else f"the process died (status {status})"
        shutil.rmtree(self.folder, ignore_errors=True)
        return Result(by, round(seconds, 1), log if self.mutant is None else "")


Rounds = Sequence[Sequence[str]]  # files of tests, or tests, by their names


def _rounds(mutant: Mutant, near: bool, before: dict[str, str]) -> Rounds:
    """What to run until something fails: the test that noticed it last time, those of the module, the fast lane."""
    last = [[before[mutant.what]]] if mutant.what in before else []
    others = [] if near else [["tests", *(f"--ignore={name}" for name in WIDE)]]
    return [*last, mutant.tests, WIDE, *others]


def _run(todo: Sequence[tuple[Mutant | None, Rounds]], jobs: int) -> Iterator[tuple[Mutant | None, Result]]:
    """Results as they come."""
    waiting = list(todo)
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            (mutant, rounds), folder = waiting.pop(0), Path(tempfile.mkdtemp(prefix="mutant-"))
            pid = _fork(functools.partial(_test, mutant, folder, rounds))
            running[pid] = Child(mutant, folder, time.monotonic())
        time.sleep(0.1)
        for pid, child in list(running.items()):
            over = time.monotonic() - child.start > LIMIT
            if over:
                os.killpg(pid, signal.SIGKILL)
            ended, status, usage = os.wait4(pid, 0 if over else os.WNOHANG)
            if ended:
                del running[pid]
                yield child.mutant, child.result(status, usage.ru_utime + usage.ru_stime, over)


def _fork(work: Callable[[], None]) -> int:
    """A child that does `work` in a process group of its own, and leaves without cleaning up after the parent."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    try:
        work()
    finally:
        os._exit(1)


def _test(mutant: Mutant | None, folder: Path, rounds: Rounds) -> None:
    """In a child: run the tests round by round, up to the first failure, whose name goes into the file `by`."""
    import pytest

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    if mutant is not None:
        sys.meta_path.insert(0, Broken(mutant))
    first = FirstFailure(folder / "by")
    for number, files in enumerate(rounds):
        given = ["-x", "-m", _fast(), "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / str(number)}"]
        code = pytest.main([*given, *files], plugins=[first])
        if code == pytest.ExitCode.USAGE_ERROR and number + 1 < len(rounds):
            continue  # a test of that name is no more
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            first.end(f"pytest ends with status {int(code)}")
            break
    else:
        first.end()
    os._exit(0)


def _fast() -> str:
    """Which tests the fast lane has, as the Makefile says it."""
    found = re.search(r"^FAST := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert found is not None
    return found[1]


class Broken(MetaPathFinder):
    """An import hook that makes one module from the changed source."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.path, self.code = str(ROOT / mutant.file), mutant.source()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        code = compile(self.code, self.path, "exec")

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        return spec_from_file_location(name, self.path, loader=Loader(name, self.path))


class FirstFailure:
    """A plugin of pytest: the first test that fails, also where it hangs.

    file: takes its name.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.by = file, ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        def hang(*_: object) -> None:
            self.end(nodeid + HANGS)
            os._exit(0)

        signal.signal(signal.SIGPROF, hang)
        signal.setitimer(signal.ITIMER_PROF, HANG)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.by:
            self.by = report.nodeid

    pytest_collectreport = pytest_runtest_logreport

    def end(self, otherwise: str = "") -> None:
        """Say what was found."""
        self.file.write_text(self.by or otherwise)


if __name__ == "__main__":
    sys.exit(main())
