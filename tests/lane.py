"""The fast lane stays fast: its tests, their lines and their time are held to what was reached.

Time is CPU time of its tests as a ratio to fixed work, which each worker does now and then: on a machine that other
work shares the ratio is about the same, on another processor within a third. `make test` loads it by `-p tests.lane`.
"""

import statistics
import time

import pytest

TESTS, LINES, RATIO = 765, 8_210, 1_800  # of one suite the ratio was below 1,300 on one processor, 1,375 on another
EVERY = 20  # tests between two times of the fixed work


def fixed_work():
    """CPU seconds of work that never changes: Python's own, and products of small matrices."""
    import torch  # only here: who hands out the tests does without

    begun = time.process_time()
    x, steps = torch.full((48, 48), 0.02, dtype=torch.float64), 0
    for step in range(3_000):
        x = (x @ x).clamp_(0.01, 0.03)
        steps += len([i for i in range(40) if (i * step) % 7])
    return time.process_time() - begun


class Worker:
    """Measures one worker, and hands what it found to the process that began the run."""

    def __init__(self, config):
        self.config, self.spent, self.work, self.tests = config, 0.0, [], 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        begun, fast = time.process_time(), item.get_closest_marker("fast")
        yield
        if fast:
            self.spent += time.process_time() - begun
            self.work += [fixed_work()] if self.tests % EVERY == 0 else []
            self.tests += 1

    def pytest_sessionfinish(self):
        self.config.workeroutput["lane"] = (self.spent, self.work)


class Lane:
    """Adds up what the workers found, and fails the run that is over."""

    def __init__(self):
        self.spent, self.work, self.tests = 0.0, [], {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        if not error:  # a worker that died tells nothing
            spent, work = node.workeroutput["lane"]
            self.spent += spent
            self.work += work

    def pytest_runtest_logreport(self, report):
        if "fast" in report.keywords:
            self.tests[report.nodeid] = report.fspath

    def found(self, root):
        """name -> (what was found, the most that there may be); nothing where no worker came to its end."""
        if not self.work:
            return {}
        files = {root / path for path in self.tests.values()}
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        ratio = self.spent / statistics.median(self.work)
        return {
            "tests": (len(self.tests), TESTS),
            "lines": (lines, LINES),
            "times the fixed work": (round(ratio), RATIO),
        }

    def pytest_terminal_summary(self, terminalreporter, config):
        found = self.found(config.rootpath)
        parts = ", ".join(f"{value:,} {name} (at most {most:,})" for name, (value, most) in found.items())
        terminalreporter.write_line(f"fast lane: {parts}; {self.spent:.0f} s of CPU")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if any(value > most for value, most in self.found(session.config.rootpath).values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config):
    config.pluginmanager.register(Worker(config) if hasattr(config, "workerinput") else Lane())
