"""The pool of Ray actors, with workers that do next to nothing: no task is lost or doubled, come what may."""

import os
import signal
import threading
import time
from collections import Counter

import pytest

from dart_eval.cluster import pool as pool_module
from dart_eval.cluster.pool import TRIES, Pool
from dart_eval.cluster.worker import Actor, Stopped
from dart_eval.util.errors import UserError
from tests.helpers.nursery import LOCAL
from tests.helpers.pools import Handler, Worker, task_of

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster(quick_workers):
    """Eight workers' room, on however many processors."""
    ray.init(num_cpus=8, **LOCAL)
    yield
    ray.shutdown()


def _run(tasks, marks, size=2, handler=None):
    handler = handler or Handler(marks)
    with Pool(Worker, size, {"num_cpus": 1}) as pool:
        pool.run(tasks, handler)
    return handler


def test_five_hundred_tasks_on_eight_workers(tmp_path):
    handler = _run([task_of("quick", f"t{i}") for i in range(500)], tmp_path, size=8)
    assert Counter(handler.results) == Counter(f"T{i}" for i in range(500))
    assert len(handler.messages) == 1000
    assert not handler.given_up
    assert {number for number, _ in handler.lines} == set(range(1, 9))


def test_tasks_that_follow_and_tasks_with_nothing_to_do(tmp_path):
    handler = _run([task_of("two", "a"), task_of("nothing", "b"), task_of("quick", "c")], tmp_path)
    assert sorted(handler.results) == ["A", "A-NEXT", "C"]
    assert _run([task_of("nothing", "b")], tmp_path).results == []
    assert _run([], tmp_path).results == []


def test_a_killed_worker_is_replaced_and_its_task_done_again(tmp_path):
    tasks = [task_of("die once", "a"), *(task_of("sleep", f"t{i}") for i in range(6))]
    handler = _run(tasks, tmp_path)
    assert sorted(handler.results) == sorted(["A", *(f"T{i}" for i in range(6))])
    ((_, name, problem),) = handler.deaths
    assert (len(handler.deaths), name) == (1, "a") and "ActorDiedError" in problem
    assert any("is lost" in text for _, text in handler.lines)


@pytest.mark.parametrize(("what", "tries", "word"), [("poison", TRIES, "planted"), ("wrong", 1, "the input is wrong")])
def test_a_poisoned_task_is_given_up_and_the_rest_goes_on(tmp_path, what, tries, word):
    handler = _run([task_of(what, "a"), *(task_of("quick", f"t{i}") for i in range(9))], tmp_path)
    assert sorted(handler.results) == sorted(f"T{i}" for i in range(9))
    assert [m[:2] for m in handler.messages].count(("a", "begin")) == tries
    problem, text = handler.given_up["a"]
    assert word in problem and f"raise {'RuntimeError' if tries > 1 else 'UserError'}" in text
    assert (f"(tried {TRIES} times)" in problem) == (tries > 1)
    assert len(handler.deaths) == 0


def test_who_makes_progress_is_not_given_up(tmp_path):
    (tmp_path / "steps").mkdir()
    handler = _run([task_of("steps", "a")], tmp_path, size=1)
    assert (handler.results, len(handler.deaths)) == (["A"], 5) and len(handler.deaths) > TRIES
    assert handler.begun == [("a", False, 0)] * 6


def test_an_actor_in_which_a_task_failed_is_replaced_and_others_stay(tmp_path):
    with Pool(Worker, 1, {"num_cpus": 1}) as pool:
        handlers = [Handler(tmp_path) for _ in range(3)]
        for handler, task in zip(
            handlers, (task_of("quick", "a"), task_of("poison", "b"), task_of("quick", "c")), strict=True
        ):
            pool.run([task], handler)
    first, second, third = ([n for n, text in h.lines if text.endswith("begins")] for h in handlers)
    assert (first, second, third) == ([1], [1, 2, 3], [4])


def test_actors_that_died_idle_cost_no_task_a_try(tmp_path):
    with Pool(Worker, 3, {"num_cpus": 1}) as pool:
        handler = Handler(tmp_path)
        pids = []
        while len(pids) < 3:
            pool.run([task_of("sleep", f"t{i}") for i in range(3)], handler)
            pids = [int(text.split("process ")[1]) for _, text in handler.lines if "runs on" in text]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        task = task_of("sleep", "after")
        pool.run([task], handler)
    assert handler.results[-1] == "AFTER" and len(handler.deaths) == 3
    assert (task.tries, task.lost, task.shrink) == (1, 0, 0)


def test_an_actor_that_dies_while_it_waits_costs_no_task_a_try(tmp_path):
    followers = [task_of("sleep", "b"), task_of("sleep", "c")]

    class Kills(Handler):
        def on_done(self, task, result):
            super().on_done(task, result)
            if task.name != "a":
                return []
            ((at, _),) = [line for line in self.lines if line[1] == "a begins"]
            (pid,) = [int(text.split("process ")[1]) for n, text in self.lines if "runs on" in text and n != at]
            os.kill(pid, signal.SIGKILL)
            time.sleep(1)  # until Ray knows
            return followers

    handler = Kills(tmp_path)
    with Pool(Worker, 2, {"num_cpus": 1}) as pool:
        while sum("runs on" in text for _, text in handler.lines) < 2:  # until both are there
            pool.run([task_of("sleep", "x"), task_of("sleep", "y")], handler)
        pool.run([task_of("sleep", "a")], handler)
    assert handler.results[-3:] == ["A", "B", "C"] and len(handler.deaths) == 1
    assert [(t.tries, t.lost) for t in followers] == [(1, 0)] * 2


def test_no_room_for_an_actor_is_told_once(tmp_path, monkeypatch):
    class Stops(Handler):
        def note(self, text):
            super().note(text)
            threading.Timer(2.5, holder.kill).start()

    monkeypatch.setattr(pool_module, "PATIENCE", 0.5)
    monkeypatch.setattr(pool_module, "POLL", 0.1)  # looks every second
    holder = Holder(8)
    handler = _run([task_of("quick", "a")], tmp_path, handler=Stops(tmp_path))
    assert len([text for number, text in handler.lines if not number]) == 1
    assert (handler.results, len(handler.deaths)) == (["A"], 0)


class Holder:
    """Keeps processors from others."""

    def __init__(self, processors):
        self.actor = ray.remote(Worker).options(num_cpus=processors).remote()
        ray.get(self.actor.__ray_ready__.remote())

    def kill(self):
        ray.kill(self.actor)


class Unreadable:
    def __reduce__(self):
        return _no_such_thing, ()


def _no_such_thing():
    raise ImportError("not on this node")


def test_a_payload_that_an_actor_cannot_take_in_fails(tmp_path):
    class Sends(Handler):
        def begin(self, task):
            return Unreadable() if task.name == "a" else super().begin(task)

    handler = _run([task_of("quick", "a"), task_of("quick", "b")], tmp_path, handler=Sends(tmp_path))
    assert handler.results == ["B"] and "not on this node" in handler.given_up["a"][1]


def test_a_task_that_kills_every_worker_is_given_up(tmp_path):
    handler = _run([task_of("die", "a"), *(task_of("sleep", f"t{i}") for i in range(4))], tmp_path)
    assert sorted(handler.results) == [f"T{i}" for i in range(4)]
    assert "the process at work on it was lost" in handler.given_up["a"][0]
    assert len(handler.deaths) == TRIES
    # Once may be an accident; twice may be for its size, as the kernel does not say.
    assert [b for b in handler.begun if b[0] == "a"] == [("a", False, 0), ("a", False, 0), ("a", True, 1)]


def test_where_memory_ran_out_a_task_is_tried_with_nothing_beside_it(tmp_path):
    handler = _run([task_of("memory", "a"), *(task_of("sleep", f"t{i}") for i in range(6))], tmp_path)
    begun = [m[2] for m in handler.messages if m[:2] == ("a", "begin")]
    ends = [m[2] for m in handler.messages if m[1] == "end"]
    assert len(begun) == TRIES and len(ends) == 6
    assert min(begun[1:]) > max(ends)


def test_an_interrupt_lets_workers_finish_what_they_tell_next(tmp_path):
    class Interrupted(Handler):
        def on_message(self, task, message):
            super().on_message(task, message)
            if message == ("step", 2) and not self.results:
                self.results.append("interrupted")
                raise KeyboardInterrupt

    handler = Interrupted(tmp_path)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _run([task_of("long", "a"), task_of("long", "b"), task_of("quick", "c")], tmp_path, handler=handler)
    assert time.monotonic() - started < pool_module.DRAIN / 2
    steps = {name: max(m[2] for m in handler.messages if m[:2] == (name, "step")) for name in ("a", "b")}
    assert 2 < max(steps.values()) < 100  # they told their next message, and stopped there
    assert handler.results == ["interrupted"]


def test_a_worker_that_cannot_be_made_fails_its_tasks(tmp_path):
    def broken():
        raise UserError("no such model")

    handler = Handler(tmp_path)
    with Pool(broken, 2, {"num_cpus": 1}) as pool:  # each time in a new actor: another node may have it
        pool.run([task_of("quick", "a")], handler)
    problem, _ = handler.given_up["a"]
    assert problem.startswith("Elsewhere: no such model (on ") and problem.endswith(f"(tried {TRIES} times)")
    assert len({n for n, text in handler.lines if "failed" in text}) == TRIES


def test_an_actor_that_stops_raises_where_it_tells():
    """The message that it tells then still comes."""
    raised = []

    class Talker:
        def run(self, payload, tell):
            for i in range(1000):
                time.sleep(0.01)
                try:
                    tell(i)
                except Stopped:
                    raised.append(i)
                    raise

    actor = Actor(Talker)
    messages = actor.run(None)
    news = [next(messages)]
    actor.stop()
    news += messages
    assert news[:-1] == [("message", i) for i in range(len(news) - 1)] and news[-1][0] == "stopped"
    assert raised == [len(news) - 2]
