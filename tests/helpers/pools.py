"""Workers and a handler for pools of Ray actors that do next to nothing."""

import os
import signal
import time

from dart_eval.cluster.pool import Task
from dart_eval.util.errors import UserError


class Worker:
    """Tells when a task begins and ends; what it does between the two is the payload's first word."""

    def run(self, payload, tell):
        what, marks, name = payload
        tell(("begin", time.time()))
        first = not os.path.exists(f"{marks}/{name}")
        open(f"{marks}/{name}", "w").close()
        if what == "die" or (what == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "poison":
            raise RuntimeError("planted")
        if what == "wrong":
            raise UserError("the input is wrong")
        if what == "memory":
            raise MemoryError
        if what == "sleep":
            time.sleep(0.3)
        if what == "steps":  # dies after every one
            done = len(os.listdir(f"{marks}/steps"))
            if done < 5:
                open(f"{marks}/steps/{done}", "w").close()
                tell(("new", done))
                time.sleep(1)  # it has been heard
                os.kill(os.getpid(), signal.SIGKILL)
        if what == "long":
            for i in range(600):
                time.sleep(0.1)
                tell(("step", i))
        tell(("end", time.time()))
        return name.upper()


class Handler:
    def __init__(self, marks):
        self.marks, self.messages, self.results, self.given_up = marks, [], [], {}
        self.lines, self.begun, self.deaths = [], [], []

    def begin(self, task):
        self.begun.append((task.name, task.alone, task.shrink))
        return None if task.what == "nothing" else (task.what, str(self.marks), task.name)

    def on_message(self, task, message):
        self.messages.append((task.name, *message))
        return message[0] == "new"

    def on_done(self, task, result):
        self.results.append(result)
        return [task_of("sleep", f"{task.name}-next")] if task.what == "two" else []

    def on_failed(self, task, problem, text):
        self.given_up[task.name] = (problem, text)

    def on_death(self, number, task, problem):
        self.deaths.append((number, task and task.name, problem))

    def note(self, text):
        self.lines.append((0, text))

    def log(self, number, text):
        self.lines.append((number, text))


def task_of(what, name):
    task = Task(name)
    task.what = what
    return task
