"""Runs in this process, and what they report."""

import signal

import pytest

from dart_eval.executors import jobs, local


def run_local(config, view):
    """Run one sweep in this process."""
    return local.run_all([config], view)


# Signals that end a run, its status then, and the word for it.
STOPS = pytest.mark.parametrize(
    ("number", "status", "word"), [
        (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "the terminal is gone"),
    ]
)  # fmt: skip


class Watch(jobs.Silent):
    """Records what the executor reports."""

    def __init__(self):
        self.done, self.broken = [], []

    def finished(self, cell, record):
        self.done.append(cell.name)

    def failed(self, cell, error, where):
        self.broken.append((cell.name, error, where))
