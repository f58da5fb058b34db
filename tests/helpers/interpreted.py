"""Checks in Triton's interpreter: a process of its own, told before Triton is imported."""

import importlib
import os
import sys
import traceback

from tests.helpers.commands import start

MODULES = (
    "kernels.gather", "kernels.image_kernels", "kernels.graded_kernels", "kernels.graded_triton",
    "pruning.choices.previewed", "pruning.choices.graded",
)  # fmt: skip


def interpreted(check, folder):
    """Run a check in such a process. folder: where it tells what went wrong."""
    process = start(_interpreted, check, folder / "told")
    process.join(600)
    told = (folder / "told").read_text()
    assert told == "all is well" and process.exitcode == 0, told


def _interpreted(check, told):
    """What went wrong is written to a file."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):  # it asks for it while it is imported; its library in C can be loaded once only
        if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    for name in MODULES:
        importlib.reload(importlib.import_module(f"dart_eval.{name}"))
    try:
        check()
    except BaseException:
        told.write_text(traceback.format_exc())
        raise
    told.write_text("all is well")
