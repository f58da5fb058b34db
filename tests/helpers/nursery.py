"""Ray's workers at once: forked from a process that has imported all that they need, instead of started anew.

Ray starts a worker by a command that begins with `sys.executable`. Here that is a script: it hands what it was given on
to the nursery, waits for the worker that is forked there, and ends when it ends. The worker runs Ray's own program and
has a process number of its own, by which Ray and the tests know it. It ends with the raylet, whose child the script is.
What serves its pages, its scaling and its logs does not start; all else of Ray's does as ever.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

from tests.helpers.commands import start

# A cluster for tests: without a dashboard, lines of workers at the driver, and gigabytes of shared memory.
LOCAL = {
    "address": "local", "include_dashboard": False, "log_to_driver": False, "logging_level": "error",
    "object_store_memory": 80_000_000,
}  # fmt: skip
SCRIPT = """#!{python} -IS
import json, os, select, socket, sys
name = next((os.path.basename(word) for word in sys.argv[1:] if word.endswith(".py")), "")
if name in ("dashboard.py", "monitor.py", "log_monitor.py"):
    sys.exit()
if name != "default_worker.py":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
nursery = socket.socket(socket.AF_UNIX)
nursery.connect({address!r})
socket.send_fds(nursery, [b"streams"], [0, 1, 2])
nursery.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
nursery.sendall(b"\\0")
raylet = os.getppid()
while os.getppid() == raylet and not select.select([nursery], [], [], 0.5)[0]:
    pass
"""


@contextlib.contextmanager
def nursery():
    """While it is entered, clusters that this process and the commands that it starts make have such workers."""
    with tempfile.TemporaryDirectory(prefix="nursery-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address, script = f"{folder}/socket", Path(folder, "python")
        script.write_text(SCRIPT.format(python=sys.executable, address=address))
        script.chmod(0o755)
        listener.bind(address)
        listener.listen(64)
        keeper = start(_keep, listener)
        try:
            with mock.patch.object(sys, "executable", str(script)):
                yield
        finally:
            keeper.kill()
            keeper.join()


def _keep(listener):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how workers ended
    while True:
        client, _ = listener.accept()
        if not os.fork():
            listener.close()
            _be_worker(client)
            sys.exit()
        client.close()


def _be_worker(client):
    """Run Ray's program for a worker; it and the script, at the other end of `client`, end together."""
    os.setpgid(0, 0)  # as the raylet has it with workers: when one is lost, it kills the whole group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, len(b"streams"), 3)
    told = b""
    while not told.endswith(b"\0"):
        told += client.recv(1 << 16)
    sys.argv, folder, environment = json.loads(told[:-1])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=[client], daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with(client):
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
