"""What tests of the executors share."""

import signal

import pytest


@pytest.fixture(scope="module")
def quick_workers():
    """Clusters that the module's tests and their commands start have workers at once."""
    from tests.helpers.nursery import nursery

    with nursery():
        yield


@pytest.fixture
def own_signals(tmp_path, monkeypatch):
    """What a worker of Ray's changes of its process is put back in the end: the folder, functions of `signal`."""
    monkeypatch.chdir(tmp_path)
    for name in ("signal", "alarm", "setitimer"):
        monkeypatch.setattr(signal, name, getattr(signal, name))
