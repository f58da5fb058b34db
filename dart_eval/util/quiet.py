"""Silence the libraries underneath: people read our own lines."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


def hush_warnings() -> None:
    """Errors of lm-eval and the hub come as exceptions too; their warnings are not for our users."""
    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "huggingface_hub", "datasets", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def silence() -> None:
    """The same, and no progress bars; it imports the libraries."""
    import datasets
    import transformers

    hush_warnings()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Nothing is heard of lm-eval but errors while the block runs: it remarks on options that are its own."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


_NOWHERE = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - libraries keep what they were given to write to


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Nothing that is printed while the block runs is heard, nor later of what is imported in it and writes there."""
    with contextlib.redirect_stdout(_NOWHERE), contextlib.redirect_stderr(_NOWHERE):
        yield
