"""Checks in Triton's interpreter: a process of its own, told before Triton is imported."""

import importlib
import os
import sys
import traceback

from dart_eval.kernels import gather, image_kernels
from dart_eval.pruning.choices import previewed
from tests.helpers.commands import start


def interpreted(check, folder):
    """Run a check in such a process. folder: where it tells what went wrong."""
    process = start(_interpreted, check, folder / "told")
    process.join(600)
    assert (folder / "told").read_text() == "all is well" and process.exitcode == 0


def _interpreted(check, told):
    """What went wrong is written to a file."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):  # it asks for it while it is imported; its library in C can be loaded once only
        if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    for module in (gather, image_kernels, previewed):
        importlib.reload(module)
    try:
        check()
    except BaseException:
        told.write_text(traceback.format_exc())
        raise
    told.write_text("all is well")
