"""Silence libraries, so that users read only our own lines."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


def hush_warnings() -> None:
    """Hide warnings of lm-eval and the hub; their errors come as exceptions too."""
    warnings.filterwarnings("ignore")
    for name in ("lm_eval", "huggingface_hub", "datasets", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def silence() -> None:
    """Hide warnings and progress bars. Imports the libraries."""
    import datasets
    import transformers

    hush_warnings()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


_NOWHERE = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - libraries keep the stream


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hide all output of the block, and later output of libraries imported in it that keep its streams."""
    with contextlib.redirect_stdout(_NOWHERE), contextlib.redirect_stderr(_NOWHERE):
        yield
