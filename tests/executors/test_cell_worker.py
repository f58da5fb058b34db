"""What evaluates cells in an actor, here in this process."""

import dataclasses
import os
import signal
import threading
import time

import pytest

from dart_eval.cluster import worker as cell_worker
from dart_eval.evaluation.shard import WHOLE, Shard
from dart_eval.sweep import jobs
from dart_eval.sweep.config import config_from
from dart_eval.util.errors import UserError

SWEEP = {"tasks": "smoke_questions", "sparsity": "0.5", "limit": 6, "batch_size": 2, "executor": "ray"}


@pytest.fixture
def make(saved_llama, own_signals):
    """Makes a worker and its configuration."""

    def make(folder, **changes):
        config = config_from(None, {**SWEEP, "model": saved_llama, "device": "cpu", **changes})
        return cell_worker.CellWorker(config, None, str(folder)), config

    return make


@pytest.mark.slow
def test_tasks_that_set_a_time_out_get_none_in_an_actor(make):
    """In a thread Python would refuse it, and lm-eval's math tasks would take that for a wrong answer."""
    make("/no/such/folder")
    found = []
    thread = threading.Thread(
        target=lambda: found.extend([signal.signal(signal.SIGALRM, print), signal.alarm(1), signal.setitimer(0, 1)])
    )
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL, 0, (0.0, 0.0)]
    assert signal.getsignal(signal.SIGALRM) is not print
    time.sleep(1.1)  # no alarm comes


def _payload(key, config, part=WHOLE, answers=(), seconds=0.0, shrink=0):
    """What the driver sends."""
    return cell_worker.Payload(key, config, part, dict(answers), 0, seconds, shrink)


def test_an_actor_evaluates_cells_of_several_sweeps(make, tmp_path):
    """Of the same task: what a run writes into lm-eval's task must not change the next sweep's keys."""
    worker, config = make(tmp_path)
    assert os.getcwd() == str(tmp_path)
    told = []
    # Nobody but the driver has to see the folder of results.
    (tmp_path / "file").touch()
    configs = [dataclasses.replace(config, method=(m,), output=str(tmp_path / "file")) for m in ("dense", "griffin")]
    for config in [*configs, configs[0]]:
        (key,) = jobs.plan_all([config], jobs.Silent(), False, "cpu")[0]
        _, record = worker.run(_payload(key, config, seconds=5.0), told.append)
        assert record.key == key and record.seconds > 5
        answers = {name: answer for message in told for name, answer in message[0].items()}
        told.clear()
        worker.run(_payload(key, config, answers=answers), told.append)
        assert not told  # all of it had been answered
    # Parts cover the cell, also where memory ran out in one of them.
    (key,) = jobs.plan_all([configs[1]], jobs.Silent(), False, "cpu")[0]
    for index, shrink in ((0, 1), (1, 0)):
        assert worker.run(_payload(key, configs[1], Shard(index, 2), shrink=shrink), told.append) == shrink
    answers = {name: answer for message in told for name, answer in message[0].items()}
    told.clear()
    worker.run(_payload(key, configs[1], answers=answers), told.append)
    assert not told
    with pytest.raises(UserError, match="would evaluate another cell than the driver planned"):
        worker.run(_payload("other", configs[0]), told.append)
