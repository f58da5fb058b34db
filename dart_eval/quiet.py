"""Silence the libraries underneath: people read our own lines."""

from __future__ import annotations

import logging
import warnings

from dart_eval.errors import RenamedWarning


def silence() -> None:
    """Errors of lm-eval and the hub come as exceptions too; their warnings and progress bars are not for our users."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("once", category=RenamedWarning)
    for name in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
